"""What the README's section Pull says, on a small repository with this one's settings.

Its remote is a folder, then servers on loopback: a bucket of an S3 server, which moto brings, a folder of an SSH
server, which asyncssh brings, and one of an HTTP server, which aiohttp brings.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from base64 import b64encode
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

STAGE = """\
import sys
from pathlib import Path

version = Path("params.yaml").read_text()
for out in sys.argv[1:]:
    Path(out).mkdir(parents=True)
    Path(out, "model.onnx").write_bytes(f"weights {version}".encode() * 1000)
    Path(out, "config.json").write_text("{}")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a command in a folder, with DVC's, git's and AWS's own settings out of the way."""
    site = tmp_path_factory.mktemp("site")
    settings = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(site),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "AWS_CONFIG_FILE": str(site / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(site / "none"),
        "NO_PROXY": "127.0.0.1",
    }

    def run(folder: Path, *command: str, fails: bool = False) -> str:
        # Nobody is there to be asked for another password.
        quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        done = subprocess.run(command, cwd=folder, env=os.environ | settings, **quiet)
        assert (done.returncode != 0) == fails, f"{command}: {done.stdout}{done.stderr}"
        return done.stderr if fails else done.stdout

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def endpoint():
    """An S3 server that has the bucket `bucket` and one user, whose keys are in the environment and are checked."""
    import boto3
    import requests
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    root = {"endpoint_url": url, "region_name": "us-east-1", "aws_access_key_id": "-", "aws_secret_access_key": "-"}
    boto3.client("s3", **root).create_bucket(Bucket="bucket")
    iam = boto3.client("iam", **root)
    iam.create_user(UserName="ada")
    allow = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName="ada", PolicyName="s3", PolicyDocument=json.dumps(allow))
    key = iam.create_access_key(UserName="ada")["AccessKey"]
    requests.post(f"{url}/moto-api/reset-auth", data="0").raise_for_status()  # from now on it checks signatures
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        environment.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        yield url
    server.stop()


@pytest.fixture(scope="module")
def loop():
    """Where servers run, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture(scope="module")
def ssh(tmp_path_factory, loop):
    """An SSH server with one user, whose password is `right`, and whose home has the known hosts; its port."""
    import asyncssh

    class Server(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return True

        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return (username, password) == ("ada", "right")

    storage, home = tmp_path_factory.mktemp("ssh"), tmp_path_factory.mktemp("home")
    key = asyncssh.generate_private_key("ssh-ed25519")

    async def start() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=Server,
            server_host_keys=[key],
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(storage)),
        )

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    port = server.get_port()
    (home / ".ssh").mkdir()
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {key.export_public_key().decode()}")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HOME", str(home))
        environment.delenv("SSH_AUTH_SOCK", raising=False)
        yield port
    loop.call_soon_threadsafe(server.close)


@pytest.fixture(scope="module")
def http(tmp_path_factory, loop):
    """A web server that reads and writes a folder for one user, whose password is `right`; its port."""
    from aiohttp import web

    storage, right = tmp_path_factory.mktemp("http"), f"Basic {b64encode(b'ada:right').decode()}"

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != right:
            return web.Response(status=401)
        path = storage / request.path.removeprefix("/")
        if request.method == "POST":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(await request.read())
            return web.Response()
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    async def start() -> web.AppRunner:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield runner.addresses[0][1]
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()


@pytest.fixture(scope="module", params=["folder", "s3", "ssh", "http"])
def remote(request, tmp_path_factory) -> tuple[str, dict[str, str]]:
    """The remote's URL, and its further settings as `dvc remote modify` names them."""
    if request.param == "folder":
        return str(tmp_path_factory.mktemp("storage")), {}
    if request.param == "ssh":
        settings = {"user": "ada", "password": "right"}
        return f"ssh://127.0.0.1:{request.getfixturevalue('ssh')}/srv/q2t", settings
    if request.param == "http":
        settings = {"auth": "basic", "user": "ada", "password": "right"}
        return f"http://127.0.0.1:{request.getfixturevalue('http')}/srv/q2t", settings
    return "s3://bucket/q2t", {"endpointurl": request.getfixturevalue("endpoint")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, run, remote) -> tuple[Path, dict[str, dict[str, bytes]]]:
    """A repository that registered one version of the student and then pushed another, and both versions' files."""
    folder = tmp_path_factory.mktemp("shared")
    graph = YAML(typ="safe").load(ROOT / "dvc.yaml")
    outs = [graph["artifacts"]["student"]["path"], "data/prompts"]
    stage = {"cmd": f"python stage.py {' '.join(outs)}", "deps": ["stage.py"], "params": ["seed"], "outs": outs}
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.name", "q2t")
    run(folder, "git", "config", "user.email", "q2t@example.org")
    run(folder, "dvc", "init", "-q")
    for name in (".dvc/config", ".gitignore"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "stage.py").write_text(STAGE)
    YAML().dump({"artifacts": graph["artifacts"], "stages": {"make": stage}}, folder / "dvc.yaml")
    url, settings = remote
    run(folder, "dvc", "remote", "add", "-d", "storage", url)
    for setting, value in settings.items():
        run(folder, "dvc", "remote", "modify", "storage", setting, value)
    versions = {}
    for version in ("v0.1.0", "v0.2.0"):
        (folder / "params.yaml").write_text(f"seed: '{version}'\n")
        run(folder, "dvc", "repro")
        run(folder, "git", "add", "-A")
        run(folder, "git", "commit", "-qm", version)
        run(folder, "gto", "register", "student", "--version", version)
        run(folder, "dvc", "push")
        versions[version] = contents(folder / outs[0])
    assert versions["v0.1.0"] != versions["v0.2.0"]
    shutil.rmtree(folder / ".dvc/cache")  # from here on the remote is the only place that has both
    assert run(folder, "git", "tag").split() == ["student@v0.1.0", "student@v0.2.0"]
    return folder, versions


@pytest.fixture
def clone(shared, run, tmp_path) -> Path:
    run(tmp_path, "git", "clone", "-q", str(shared[0]), "clone")
    assert not (tmp_path / "clone/models").exists()
    return tmp_path / "clone"


def test_pull_brings_all_data_and_models_of_a_commit(shared, clone, run):
    run(clone, "dvc", "pull")
    for part in ("data", "models"):
        assert contents(clone / part) == contents(shared[0] / part) != {}
    assert run(clone, "git", "status", "--porcelain") == ""


def test_a_clone_goes_on_without_running_or_pulling_what_is_up_to_date(clone, run):
    assert "Running stage" not in run(clone, "dvc", "repro", "--pull", "--allow-missing")
    assert not (clone / "models").exists()


def test_get_brings_one_model_without_a_clone(shared, run, tmp_path):
    folder, versions = shared
    run(tmp_path, "dvc", "get", folder.as_uri(), "models/int8", "-o", "student")
    assert contents(tmp_path / "student") == versions["v0.2.0"]


def test_a_version_is_a_tag_that_brings_its_own_bytes(shared, run, tmp_path):
    folder, versions = shared
    run(tmp_path, "dvc", "artifacts", "get", folder.as_uri(), "student", "--rev", "v0.1.0", "-o", "student")
    assert contents(tmp_path / "student") == versions["v0.1.0"]


@pytest.mark.parametrize("remote", ["s3"], indirect=True)
@pytest.mark.parametrize("user", ["ada", "nobody"])
def test_wrong_credentials_are_refused(clone, run, user):
    name = os.environ["AWS_ACCESS_KEY_ID"] if user == "ada" else user
    for setting, value in {"access_key_id": name, "secret_access_key": "wrong"}.items():
        run(clone, "dvc", "remote", "modify", "--local", "storage", setting, value)
    assert "failed to connect to s3 (bucket/q2t/files/md5) - Forbidden" in run(clone, "dvc", "pull", fails=True)


@pytest.mark.parametrize("remote", ["ssh"], indirect=True)
def test_a_wrong_password_is_refused(clone, run):
    run(clone, "dvc", "remote", "modify", "--local", "storage", "password", "wrong")
    assert "failed to connect to ssh (/srv/q2t/files/md5)" in run(clone, "dvc", "pull", fails=True)


@pytest.mark.parametrize("remote", ["http"], indirect=True)
def test_with_a_wrong_password_a_web_server_seems_to_have_nothing(clone, run):
    run(clone, "dvc", "remote", "modify", "--local", "storage", "password", "wrong")
    assert "Missing cache files" in run(clone, "dvc", "pull", fails=True)


@pytest.mark.parametrize("remote", ["s3"], indirect=True)
def test_a_bucket_that_is_not_there_is_refused(clone, run):
    run(clone, "dvc", "pull")
    run(clone, "dvc", "remote", "modify", "--local", "storage", "url", "s3://absent/q2t")
    assert "The specified bucket does not exist" in run(clone, "dvc", "push", fails=True)
