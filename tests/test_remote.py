"""What is trained, shared by S3: a server on this machine. `pip install -e '.[remote]'` has it."""

from pathlib import Path

import pytest

from tests.project import clone_of, dvc, git, minimind, share, stages_run

pytest.importorskip("dvc_s3")
moto_server = pytest.importorskip("moto.server")
KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


def test_s3_brings_outputs_and_past_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="store")
        project, clone = tmp_path / "project", tmp_path / "clone"
        project.mkdir()
        git(project, "init", "-q")
        dvc(project, "init", "-q")
        (project / "data").write_text("1\n")
        files = ["-d", "data", "-o", "weights", "-M", "metrics.json"]  # which git keeps
        command = "cp data weights; echo {} > metrics.json"
        dvc(project, "stage", "add", "-n", "train", *files, command)
        dvc(project, "repro")
        share(project, "s3://store/minimind", ENDPOINT=endpoint)
        clone_of(project, clone)
        minimind(clone, "pull")
        assert (clone / "weights").read_text() == "1\n"
        (clone / "dvc.lock").unlink()
        assert not stages_run(dvc(clone, "repro"))
    finally:
        server.stop()
