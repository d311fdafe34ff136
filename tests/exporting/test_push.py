"""Publishing: what is sent, by huggingface_hub's own client to a Hub on loopback; and what is never sent."""

import base64
import json

import pytest
import yaml
from stand_in import JsonHandler, serving
from tiny import write_recipe
from typer.testing import CliRunner

from emogen.cli.__main__ import app
from emogen.errors import InputError, ModelError
from emogen.exporting.push import check_repository, push, stage
from emogen.train import main as train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory, labels):
    folder = tmp_path_factory.mktemp("pushed")
    train([str(write_recipe(folder, labels, max_steps=1, eval_fraction=0.4, save_strategy="steps", save_steps=1))])
    return folder / "run"


@pytest.fixture
def hub(monkeypatch):
    """A Hub that keeps what it gets: `hub.files`, `hub.created`; `hub.status` other than 200 refuses."""

    class Hub(JsonHandler):
        files: dict[str, bytes] = {}  # noqa: RUF012
        created: list[dict] = []  # noqa: RUF012
        status = 200

        def do_POST(self):
            body = self.read() if self.headers.get("content-length") else self.chunks()
            if self.path == "/api/repos/create":
                Hub.created.append(json.loads(body))
                self.reply({"url": f"http://{self.headers['host']}/owner/name", "name": "owner/name"})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                self.reply(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
                )
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        Hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.reply(
                    {
                        "success": True,
                        "commitOid": "abc",
                        "commitUrl": f"http://{self.headers['host']}/owner/name/commit/abc",
                    }
                )
            else:
                self.reply({})

        def do_GET(self):
            self.reply({"sha": "abc", "siblings": [], "id": "owner/name"})

        def chunks(self):
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def reply(self, value):
            super().reply(value, Hub.status)

    with serving(Hub) as address:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield Hub


def test_only_what_a_model_needs_is_staged(run, tmp_path):
    files = {str(file) for file in stage(run, tmp_path)}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/tokenizer.json"} <= files
    assert {"prompt.jinja", "labels.yaml", "thresholds.json", "README.md", "recipe.yaml"} <= files
    assert not {
        name for name in files if name.split("/")[0] in ("predictions.jsonl", "examples.jsonl", "manifest.json")
    }
    assert not {name for name in files if name.endswith((".jsonl", ".html", ".csv", ".bin", ".pt"))}
    assert not {name for name in files if "checkpoint" in name}


def test_no_path_of_this_machine_is_in_what_is_staged(run, tmp_path):
    stage(run, tmp_path)
    here = str(run.parent)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert here.encode() not in path.read_bytes(), path
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["prompt"] == "prompt.jinja"
    assert "/" not in recipe["train_file"]
    assert "output_dir" not in recipe


def test_a_run_is_published_by_the_hubs_own_client(hub, run, tmp_path):
    stage(run, tmp_path)
    assert push(tmp_path, "run", "owner/name", private=True).endswith("/owner/name/commit/abc")
    created = hub.created[-1]
    assert created.get("visibility") == "private" or created.get("private")  # the newer and the older client
    assert hub.files["prompt.jinja"] == (run / "prompt.jinja").read_bytes()
    assert (
        hub.files["adapter/adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    texts = [json.loads(line)["text"] for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert not any(text.encode() in content for content in hub.files.values() for text in texts)


def test_a_hub_that_refuses_is_an_error(hub, run):
    hub.status = 403
    try:
        with pytest.raises(ModelError, match="owner/name: the Hub refuses"):
            push(run, "run", "owner/name")
    finally:
        hub.status = 200


def test_training_rows_in_the_prompt_are_published_on_request_only(tmp_path, run):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "examples.jsonl").write_text(json.dumps({"text": "a row", "labels": ["joy"]}) + "\n")
    with pytest.raises(InputError, match="its prompt shows 1 of the training rows"):
        stage(copy, tmp_path / "out")
    assert "examples.jsonl" in {str(file) for file in stage(copy, tmp_path / "out", with_examples=True)}


def test_a_dry_run_lists_files_and_sends_nothing(hub, run):
    hub.files.clear()
    result = CliRunner().invoke(app, ["push", str(run), "owner/name", "--dry-run"])
    assert result.exit_code == 0
    assert "MB  adapter/adapter_model.safetensors" in result.output
    assert not hub.files


def test_what_is_no_repository_is_refused():
    for wrong in ("name", "a/b/c", "../x", ""):
        with pytest.raises(InputError, match="OWNER/NAME"):
            check_repository(wrong)
