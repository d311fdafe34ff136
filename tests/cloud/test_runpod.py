"""The client of Runpod's API: requests, errors, keys, pods, logs; and the fake that stands for the API in the tests."""

import sys
import time

import fake_runpod
import httpx
import pytest
from fake_runpod import ACTIONS, DOCUMENT, KEY, KEYS, OPERATIONS, TOKEN

from emogen.cloud import launch, runpod
from emogen.cloud.runpod import Polling
from emogen.distribution import install_hint
from emogen.errors import InputError, ModelError

QUICK = Polling(poll=0, provision=5, patience=3)
NAME = "emogen-x-00000000-1700000000"


def flatten(schema):
    """The properties of an object schema and its required ones, with references and `allOf` resolved."""
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    properties, required = dict(schema.get("properties", {})), set(schema.get("required", []))
    for part in schema.get("allOf", []):
        more, needed = flatten(part)
        properties |= more
        required |= needed
    return properties, required


# ------------------------------------------------------------------------------------- the fake and Runpod's document


def test_the_document_says_where_it_comes_from():
    assert DOCUMENT["info"]["version"] == "2.0.0"
    assert "Runpod's own OpenAPI document" in DOCUMENT["info"]["x-origin"]


def test_the_fake_matches_runpods_document(fake):
    assert all(callable(getattr(fake_runpod.Handler, name)) for name in OPERATIONS)
    pod = fake.shown(fake.add({"name": "x"}))
    properties, required = flatten({"$ref": "#/components/schemas/Pod"})
    assert required <= pod.keys()
    assert pod.keys() - properties.keys() == {"aFieldOfNextYear"}
    statuses = set(DOCUMENT["components"]["schemas"]["PodStatus"]["enum"])
    assert set(ACTIONS) == statuses - {"TERMINATED"}
    assert {action for actions in ACTIONS.values() for action in actions} == set(
        DOCUMENT["components"]["schemas"]["PodAction"]["enum"]
    )


def test_the_client_reads_what_runpods_document_has():
    statuses = set(DOCUMENT["components"]["schemas"]["PodStatus"]["enum"])
    assert set(runpod.LIVE) | {"EXITED", "ERROR", "TERMINATED"} == statuses
    models = {"Pod": runpod.Pod, "GpuConfig": runpod.PodGpu, "PodSsh": runpod.Ssh, "PodSshEndpoint": runpod.SshEndpoint}
    for name, model in models.items():
        properties, required = flatten({"$ref": f"#/components/schemas/{name}"})
        assert set(model.model_fields) <= set(properties), name
        assert {key for key, field in model.model_fields.items() if field.is_required()} <= required, name


@pytest.mark.parametrize(
    ("method", "path", "body", "error"),
    [
        ("POST", "/v2/pods", {"name": "x", "image": "i", "gpu": {"id": "NVIDIA A40"}, "disc": 40}, "'disc' was unexpected"),
        ("POST", "/v2/pods", {"name": "x", "image": "i", "gpu": {"id": "NVIDIA A40", "number": 1}}, "'number' was unexpected"),
        ("POST", "/v2/pods", {"image": "i", "gpu": {"id": "NVIDIA A40"}}, "'name' is a required property"),
        ("POST", "/v2/pods", {"name": "x", "gpu": {"id": "NVIDIA A40"}}, "'image' is a required property"),
        ("POST", "/v2/pods", {"name": "x", "image": "i", "gpu": {"id": "NVIDIA A40"}, "disk": "40"}, "'40' is not of type 'integer'"),
        ("POST", "/v2/pods", {"name": "x", "image": "i", "mounts": {"persistent": {"size": 9, "path": "/"}}}, "9 is less than the minimum of 10"),
        ("POST", "/v2/pods/pod0/action", {"action": "pause"}, "'pause' is not one of"),
        ("POST", "/v2/pods/pod0/action", None, "None is not of type 'object'"),
        ("GET", "/v2/pods?name=x", None, "unknown parameter name"),
        ("GET", "/v2/pods/pod0/logs?tail=5001", None, "5001 is greater than the maximum of 5000"),
        ("GET", "/v2/catalog/gpus?product=POD,CAR", None, "'CAR' is not one of"),
        ("DELETE", "/v2/pods/pod0", {"force": True}, "unexpected body"),
        ("DELETE", "/v2/pods", None, "unknown operation DELETE /v2/pods"),
    ],
)  # fmt: skip
def test_the_fake_refuses_what_runpods_document_does_not_allow(fake, api, method, path, body, error):
    fake.add({"name": NAME})
    answer = api.client.request(method, path, json=body)
    assert answer.status_code == (404 if "unknown operation" in error else 422)
    assert any(error in message for message in fake.invalid), fake.invalid
    fake.invalid.clear()


def test_the_fake_notices_its_own_invalid_answers(fake, api):
    del fake.add({"name": NAME})["cost"]
    api.request("GET", "/v2/pods")
    assert fake.invalid == ["$.pods[0]: 'cost' is a required property"]
    fake.invalid.clear()


# ----------------------------------------------------------------------------------------------------------- requests


def test_a_rate_limited_request_waits_as_long_as_the_api_says(fake, api, bodies):
    fake.failures = [
        ("POST", "/v2/pods", (429, {"Retry-After": "7"})),
        ("GET", "/v2/pods", (429, {"Retry-After": "9"})),
    ]
    launch.create(api, bodies[0], KEYS)
    runpod.list_pods(api)
    assert api.waited == [7, 9]
    assert len(fake.pods) == 1


@pytest.mark.parametrize("how", [500, 503, "drop"])
def test_reading_is_repeated(fake, api, how):
    fake.failures = [("GET", "/v2/pods", how)] * 3
    assert runpod.list_pods(api) == []
    assert len(fake.bodies("GET", "/v2/pods")) == 4
    fake.failures = [("GET", "/v2/pods", how)] * 5
    with pytest.raises(runpod.ApiError):
        runpod.list_pods(api)


def test_a_timeout_is_no_answer(fake, bodies):
    fake.failures = [("POST", "/v2/pods", "silence"), ("GET", "/v2/pods", "silence"), ("POST", "/v2/pods", "silence")]
    with runpod.open_api(KEYS, timeout=0.1) as api:
        api.pause, api.tries = (lambda seconds: None), 2
        with pytest.raises(runpod.ApiError, match="ReadTimeout") as raised:
            launch.create(api, bodies[0], KEYS)
    assert raised.value.status is None
    assert [method for method, _, _ in fake.requests] == ["POST", "GET", "GET", "POST", "GET"]


def test_the_client_is_httpx_and_follows_no_redirects(fake):
    with runpod.open_api(KEYS) as api:
        assert isinstance(api.client, httpx.Client)
        assert api.client.follow_redirects is False  # a redirect would send the key elsewhere


# --------------------------------------------------------------------------------------------------------------- keys


def test_a_key_file_is_read_only_if_no_other_user_can_read_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    path = tmp_path / "emogen" / "keys"
    path.parent.mkdir()
    path.write_text("RUNPOD_API_KEY = 'abc'\nHF_TOKEN=from the file\nOTHER=1\n")
    path.chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        runpod.read_keys()
    path.chmod(0o600)
    assert runpod.read_keys() == {"RUNPOD_API_KEY": "abc", "HF_TOKEN": "from the environment"}


def test_a_wrong_or_missing_key_and_an_unencrypted_address_are_errors(fake, monkeypatch):
    with (
        runpod.open_api({"RUNPOD_API_KEY": "wrong-key"}) as api,
        pytest.raises(InputError, match="check RUNPOD_API_KEY"),
    ):
        runpod.list_pods(api)
    with pytest.raises(InputError, match="set RUNPOD_API_KEY"), runpod.open_api({}):
        pass
    monkeypatch.setenv("RUNPOD_API_URL", "http://192.0.2.1")
    with pytest.raises(InputError, match="https is needed"), runpod.open_api(KEYS):
        pass


def test_without_httpx_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(InputError) as raised, runpod.open_api(KEYS):
        pass
    assert install_hint("pods") in str(raised.value)
    assert "httpx>=" in str(raised.value)


def test_errors_contain_no_keys(fake, api, bodies):
    fake.failures = [("POST", "/v2/pods", 422)]  # the answer repeats the request
    with pytest.raises(ModelError, match=r"EMOGEN_POD.*\*\*\*") as raised:
        launch.create(api, bodies[0], KEYS)
    assert KEY not in str(raised.value)
    assert TOKEN not in str(raised.value)


# --------------------------------------------------------------------------------------------------------------- pods


def test_an_action_that_has_taken_effect_already_is_no_error(fake, api):
    fake.add({"name": NAME}, "RUNNING")
    (pod,) = runpod.list_pods(api)
    runpod.act(api, pod, "stop")
    runpod.act(api, pod, "stop")  # 409
    assert fake.pods[pod.id]["status"] == "EXITED"
    assert runpod.terminate(api, pod.name) == 1  # 204, without a body
    assert runpod.terminate(api, pod.name) == 0
    assert runpod.get_pod(api, pod) is None
    with pytest.raises(runpod.ApiError):
        runpod.act(api, pod, "start")


def test_other_pods_of_the_account_are_left_alone(fake, api):
    for name in ("emogen", f"my-{NAME}", NAME):
        fake.add({"name": name}, "RUNNING")
    assert [pod.name for pod in runpod.list_pods(api)] == [NAME]
    with pytest.raises(InputError, match="no pod of that name"):
        runpod.find_pod(api, "my-emogen")


def test_reap_terminates_the_pods_past_their_limit(fake, emogen):
    now = int(time.time())
    fake.add({"name": f"emogen-new-00000000-{now}"}, "RUNNING")
    fake.add({"name": "emogen-old-00000000-1700000000"}, "EXITED")
    fake.add({"name": "emogen-long-00000000-1700000001", "env": {"EMOGEN_DEADLINE": str(now + 99)}}, "RUNNING")
    fake.add({"name": f"emogen-short-00000000-{now - 3000}", "env": {"EMOGEN_DEADLINE": str(now - 1000)}}, "RUNNING")
    fake.add({"name": "theirs"}, "RUNNING")
    printed = emogen("pod", "reap", "--dry-run").out
    assert "emogen-old-" in printed
    assert len(fake.pods) == 5
    fake.failures = [("DELETE", ".*", 409)]  # one that cannot be terminated is no reason to leave the other
    assert "problem 409" in emogen("pod", "reap", code=1).err
    assert len(fake.pods) == 4
    emogen("pod", "reap")
    assert {pod["name"].split("-")[1] for pod in fake.pods.values() if "-" in pod["name"]} == {"new", "long"}
    listed = emogen("pod", "list").out
    assert "emogen-new-" in listed
    assert KEY not in listed


# --------------------------------------------------------------------------------------------------------------- logs


def test_a_log_that_breaks_off_continues_with_the_next_line(fake, api):
    pod = fake.add({"name": NAME}, "RUNNING")
    container = fake.containers[pod["id"]]
    lines = [f"line {k}" for k in range(7)] + ["twice", f"key {KEY}"]
    for line in lines:  # each two of them have the same id
        container.print(line)
    fake.drops = [0, 3, 1, 2, 1]
    fake.failures = [("GET", ".*/logs", 503), ("GET", ".*/logs", (429, {"Retry-After": "4"}))]
    received = []
    for line in runpod.logs(api, runpod.list_pods(api)[0], QUICK):
        received.append(line)
        if len(received) == len(lines):
            fake.halt(pod, "EXITED")
    assert received == [*lines[:-1], "key ***"]
    assert 4 in api.waited


def test_a_log_that_can_no_longer_be_read_is_an_error(fake, api):
    pod = fake.add({"name": NAME}, "RUNNING")
    fake.failures = [("GET", ".*/logs", "drop")] * 99 + [("GET", f"/v2/pods/{pod['id']}", "drop")] * 99
    with pytest.raises(runpod.ApiError, match="connection is lost"):
        list(runpod.logs(api, runpod.list_pods(api)[0], QUICK))
    fake.failures = [("GET", ".*/logs", 403)]
    with pytest.raises(runpod.ApiError, match="403"):
        list(runpod.logs(api, runpod.list_pods(api)[0], QUICK))
