const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const kept = (name, value) => {
  try {
    if (value !== undefined) localStorage.setItem(name, value);
    return localStorage.getItem(name);
  } catch { return null; } // of a file, some browsers keep nothing
};

const scrolled = [...document.querySelectorAll(".wide, nav")];
const edges = () => {
  for (const box of scrolled) {
    const rest = box.scrollWidth - box.clientWidth - box.scrollLeft;
    box.classList.toggle("more-left", box.scrollLeft > 1);
    box.classList.toggle("more-right", rest > 1);
  }
};
const resized = new ResizeObserver(edges); // also when details open
for (const box of scrolled) {
  box.addEventListener("scroll", edges, { passive: true });
  resized.observe(box);
}

const speak = (language) => { root.lang = language; edges(); };
speak(kept("language") ?? (navigator.language.startsWith("zh") ? "zh-CN" : "en"));
byId("language").onclick = () => { speak(root.lang === "en" ? "zh-CN" : "en"); kept("language", root.lang); };

const isDark = () => (root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
root.style.colorScheme = kept("theme") ?? "";
byId("theme").onclick = () => { root.style.colorScheme = isDark() ? "light" : "dark"; kept("theme", root.style.colorScheme); };

const prompts = [...document.querySelectorAll("article.prompt")];
const filter = () => {
  const [kind, language, verdict] = ["kind", "prompt-language", "verdict"].map((id) => byId(id).value);
  for (const prompt of prompts) {
    prompt.hidden = (kind && prompt.dataset.kind !== kind) || (language && prompt.dataset.language !== language);
    for (const answer of prompt.querySelectorAll("li")) answer.hidden = verdict && !answer.classList.contains(verdict);
  }
  byId("shown").textContent = `${prompts.filter((prompt) => !prompt.hidden).length} / ${prompts.length}`;
};
for (const id of ["kind", "prompt-language", "verdict"]) byId(id).onchange = filter;
filter();

const reveal = () => { byId(decodeURIComponent(location.hash.slice(1)))?.closest("details")?.setAttribute("open", ""); };
addEventListener("hashchange", reveal);
reveal();
for (const graph of document.querySelectorAll(".graph")) graph.parentElement.scrollLeft = (graph.clientWidth - graph.parentElement.clientWidth) / 2;
edges();
addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
