"""Settings: who wins, how values are written, and everything that stops a start or is said at it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from covey import errors, settings, settings_reader, settings_table

Part = settings_table.Part


def controller(environ: Mapping[str, str] = {}, flags: Mapping[str, object] = {}) -> settings.Controller:
    return settings.controller({"COVEY_CONFIG": "/dev/null", "COVEY_ALLOW_EMPTY_REGISTRY": "true", **environ}, flags)


def standalone(environ: Mapping[str, str] = {}) -> settings.Standalone:
    return settings.standalone({"COVEY_CONFIG": "/dev/null", **environ})


def refusal(environ: Mapping[str, str], flags: Mapping[str, object] = {}) -> str:
    with pytest.raises(errors.SettingError) as caught:
        controller(environ, flags)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- who wins ------------------------------------------------------------------------------------------------------


def test_out_of_the_box() -> None:
    chosen = standalone()
    assert str(chosen.listen) == "127.0.0.1:8090"
    assert str(chosen.registry_listen) == "127.0.0.1:8089"
    assert chosen.listen_client_urls == ()  # a free loopback port
    assert controller().notices == chosen.notices == ()


def test_data_dir_depends_on_who_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert standalone().data_dir == Path("/var/lib/covey")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/ann")
    assert standalone().data_dir == Path("/home/ann/.local/share/covey")


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "covey.toml"
    environ = {"COVEY_CONFIG": str(file)}
    assert controller({}).instance_time_out_s == 60
    file.write_text('instance_time_out = "2s"\n')
    assert controller(environ).instance_time_out_s == 2
    environ["ANKA_INSTANCE_TIME_OUT"] = "3s"
    assert controller(environ).instance_time_out_s == 3
    environ["COVEY_INSTANCE_TIME_OUT"] = "4s"
    assert controller(environ).instance_time_out_s == 4
    assert controller(environ, {"INSTANCE_TIME_OUT": "5s"}).instance_time_out_s == 5
    assert controller(environ, {"INSTANCE_TIME_OUT": None}).instance_time_out_s == 4


def test_a_programs_own_table_in_the_file_wins(tmp_path: Path) -> None:
    file = tmp_path / "covey.toml"
    file.write_text(
        'listen_addr = "127.0.0.1:1"\n[registry]\nlisten_addr = "127.0.0.1:2"\n'
        '[agent]\ncontroller = ["http://a:1", "b:2"]\n'
    )
    environ = {"COVEY_CONFIG": str(file), "COVEY_ALLOW_EMPTY_REGISTRY": "true"}
    assert settings.controller(environ).listen.port == 1
    assert settings.registry(environ).listen.port == 2
    assert settings.agent(environ).controllers == ("http://a:1", "http://b:2")


@pytest.mark.parametrize("row", settings_table.TABLE, ids=lambda row: f"{row.name}-{row.parts[0]}")
def test_covey_and_anka_and_aliases_mean_the_same(row: settings_table.Setting) -> None:
    for spelled in (row.name, *row.aliases):
        for prefix in ("COVEY_", "ANKA_"):
            environ = {"COVEY_CONFIG": "/dev/null", prefix + spelled: "x"}
            if row.unbuilt:
                with pytest.raises(errors.SettingError, match=prefix + spelled):
                    settings_reader.Reader(row.parts[0], environ, {})
            else:
                read = settings_reader.Reader(row.parts[0], environ, {})
                assert read.find(row.name) == ("x", prefix + spelled)


def test_the_products_double_prefix() -> None:
    for name in ("ANKA_ANKA_REGISTRY", "COVEY_ANKA_REGISTRY"):
        assert controller({name: "http://reg:8089,reg2:8089/"}).registries == ("http://reg:8089", "http://reg2:8089")


def test_an_empty_variable_is_unset() -> None:
    assert controller({"COVEY_INSTANCE_TIME_OUT": "", "ANKA_INSTANCE_TIME_OUT": "7s"}).instance_time_out_s == 7


def test_the_controllers_own_registry_may_differ() -> None:
    both = {"ANKA_ANKA_REGISTRY": "http://outside:1", "ANKA_LOCAL_ANKA_REGISTRY": "http://inside:2"}
    assert controller(both).local_registries == ("http://inside:2",)
    assert controller({"ANKA_ANKA_REGISTRY": "http://outside:1"}).local_registries == ("http://outside:1",)


def test_etcd_endpoints_with_or_without_scheme() -> None:
    chosen = controller({"ANKA_ETCD_ENDPOINTS": "etcd-1:2379, http://etcd-2:2379/"})
    assert chosen.etcd_endpoints == ("etcd-1:2379", "etcd-2:2379")
    assert not chosen.etcd_tls
    assert controller({"ANKA_ETCD_ENDPOINTS": "https://etcd-1:2379"}).etcd_tls


# ---- how values are written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("30s", 30), ("2m", 120), ("1m30s", 90), ("1.5h", 5400), (".5s", 0.5), ("250ms", 0.25), ("5us", 5e-6)],
)
def test_durations_are_gos(text: str, seconds: float) -> None:
    assert settings_reader.duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "1m 30s", "-5s", "5 s", "1d", "m1", "5sx", "１s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError):
        settings_reader.duration_s(text)


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:8090", "127.0.0.1", 8090, True),
        ("localhost:1", "localhost", 1, True),
        ("[::1]:80", "::1", 80, True),
        ("127.8.8.8:0", "127.8.8.8", 0, True),
        (":80", "", 80, False),
        ("0.0.0.0:80", "0.0.0.0", 80, False),  # noqa: S104
        ("[::]:80", "::", 80, False),
        ("example.org:80", "example.org", 80, False),
    ],
)
def test_addresses(text: str, host: str, port: int, loopback: bool) -> None:
    where = settings_reader.address(text)
    assert (where.host, where.port, where.loopback) == (host, port, loopback)
    assert settings_reader.address(str(where)) == where


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("INSTANCE_TIME_OUT", "5", "a duration such as"),
        ("HEARTBEAT", "0s", "above 0"),
        ("LISTEN_ADDR", "8090", "an address such as"),
        ("LISTEN_ADDR", "::1:80", "an address such as"),
        ("LISTEN_ADDR", "127.0.0.1:99999", "an address such as"),
        ("ALLOW_ANONYMOUS", "maybe", "true or false"),
        ("UNKNOWN_VM_THRESHOLD", "1.5", "a whole number"),
        ("ANKA_REGISTRY", "ftp://x", "list of URLs"),
        ("ANKA_REGISTRY", "http://a b", "list of URLs"),
        ("LOG_LEVEL", "loud", "one of: debug"),
        ("ETCD_CA_CERT", "/no/such/file", "a file that can be read"),
    ],
)
def test_a_malformed_value_names_the_field_and_the_remedy(name: str, value: str, wanted: str) -> None:
    environ = {"COVEY_" + name: value}
    if name == "ALLOW_ANONYMOUS":
        environ["COVEY_LISTEN_ADDR"] = ":80"
    text = refusal(environ)
    assert text.startswith(f"COVEY_{name}: {value!r} is not ")
    assert wanted in text


def test_a_malformed_flag_is_named_as_a_flag() -> None:
    assert refusal({}, {"INSTANCE_TIME_OUT": "soon"}).startswith("--instance-time-out: 'soon' is not a duration")


def test_a_file_that_is_named_must_exist_and_be_toml(tmp_path: Path) -> None:
    assert "there is no file" in refusal({"COVEY_CONFIG": str(tmp_path / "none.toml")})
    (tmp_path / "bad.toml").write_text("a = [")
    assert "is not TOML" in refusal({"COVEY_CONFIG": str(tmp_path / "bad.toml")})


# ---- what stops a start --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENABLE_AUTH", "true"),
        ("ROOT_TOKEN", "0123456789"),
        ("ENABLE_API_KEYS", "true"),
        ("SKIP_TLS_VERIFICATION", "1"),
        ("CRL", "/etc/crl.pem"),
        ("OIDC_PROVIDER_URL", "https://id"),
        ("SKIP_ETCD_TLS_VERIFICATION", "true"),
        ("ENABLE_CENTRAL_LOGGING", "true"),
        ("QUEUE_ADDR", "q:1"),
    ],
)
@pytest.mark.parametrize("prefix", ["COVEY_", "ANKA_"])
def test_a_feature_that_is_not_built_is_never_ignored(prefix: str, name: str, value: str) -> None:
    text = refusal({prefix + name: value})
    assert text.startswith(f"{prefix}{name} is set, but ")
    assert value not in text  # it may be a secret


def test_the_all_in_one_service_says_that_it_speaks_no_tls() -> None:
    with pytest.raises(errors.SettingError, match="COVEY_USE_HTTPS is set, but the all-in-one service speaks no TLS"):
        settings.standalone({"COVEY_CONFIG": "/dev/null", "COVEY_USE_HTTPS": "true"})


def registry(environ: Mapping[str, str]) -> settings.Registry:
    return settings.registry({"COVEY_CONFIG": "/dev/null", **environ})


def test_a_registry_in_a_bucket() -> None:
    assert registry({}).s3 is None
    s3 = {"ANKA_BACKEND_TYPE": "s3", "ANKA_BACKEND_S3_BUCKET": "b"}
    assert registry(s3).s3 == settings.S3(
        bucket="b",
        part_size_bytes=8 << 20,
        concurrency=4,
        path_style=False,
        skip_tls_verification=False,
        redirect_s=0.0,
    )
    for text, size in (("32", 32 << 20), ("8388608", 8 << 20)):
        found = registry({**s3, "COVEY_BACKEND_S3_UPLOAD_PART_SIZE": text}).s3
        assert found is not None
        assert found.part_size_bytes == size


def test_a_registry_with_tls_and_figures(tmp_path: Path) -> None:
    (tmp_path / "x.pem").touch()
    pem = str(tmp_path / "x.pem")
    secure = {"ANKA_USE_HTTPS": "true", "ANKA_SERVER_CERT": pem, "ANKA_SERVER_KEY": pem}
    assert registry(secure).tls == settings.Tls(cert=tmp_path / "x.pem", key=tmp_path / "x.pem")
    assert registry({"ANKA_SERVER_CERT": pem}).tls is None
    controller = {"COVEY_CONFIG": "/dev/null", "ANKA_ALLOW_EMPTY_REGISTRY": "true"}
    more = {"ANKA_MIN_TLS_VERSION": "VersionTLS13", "ANKA_MAX_TLS_VERSION": "TLSv1.3", "ANKA_CIPHER_SUITES": "A, B"}
    assert settings.controller(controller).tls is None
    assert settings.controller({**controller, **secure, **more}).tls == settings.Tls(
        cert=tmp_path / "x.pem", key=tmp_path / "x.pem", lowest="1.3", highest="1.3", ciphers=("A", "B")
    )
    assert registry({"ANKA_ENABLE_METRICS": "true"}).metrics == settings.Metrics(port=2112, path="/metrics")
    assert registry({}).metrics is None


_HTTPS = {"USE_HTTPS": "true", "SERVER_CERT": "/dev/null", "SERVER_KEY": "/dev/null"}


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"BACKEND_TYPE": "s3"}, "BACKEND_TYPE is s3 but BACKEND_S3_BUCKET is not set"),
        ({"BACKEND_TYPE": "tape"}, "ANKA_BACKEND_TYPE: 'tape' is not one of: disk, s3"),
        ({"BACKEND_S3_UPLOAD_PART_SIZE": "4"}, "BACKEND_S3_UPLOAD_PART_SIZE=4 is not 5 to 1024 MiB"),
        ({"BACKEND_S3_UPLOAD_CONCURRENCY": "0"}, "BACKEND_S3_UPLOAD_CONCURRENCY=0 is not 1 to 64"),
        ({"USE_HTTPS": "true"}, "USE_HTTPS is true but SERVER_CERT is not set"),
        ({**_HTTPS, "MIN_TLS_VERSION": "1.1"}, "MIN_TLS_VERSION=1.1 is not 1.2 or 1.3"),
        ({**_HTTPS, "MAX_TLS_VERSION": "2"}, "MAX_TLS_VERSION=2 is not 1.2 or 1.3"),
        ({**_HTTPS, "MIN_TLS_VERSION": "1.3", "MAX_TLS_VERSION": "1.2"}, "MIN_TLS_VERSION=1.3 is above MAX_TLS_V"),
        ({"ENABLE_METRICS": "true", "METRICS_PATH": "metrics"}, "METRICS_PATH=metrics is not a path"),
        ({"ENABLE_METRICS": "true", "METRICS_PORT": "70000"}, "METRICS_PORT=70000 is not a port"),
    ],
)
def test_what_a_registry_cannot_do_stops_its_start(environ: Mapping[str, str], text: str) -> None:
    given = {"ANKA_" + name: value for name, value in environ.items()}
    if "UPLOAD" in str(environ):
        given |= {"ANKA_BACKEND_TYPE": "s3", "ANKA_BACKEND_S3_BUCKET": "b"}
    with pytest.raises(errors.SettingError, match=text):
        registry(given)


_REPLICA = {
    "REGISTRY_MODE": "replica",
    "REGISTRY_ADVERTISE_URL": "http://a:8089",
    "REGISTRY_PEERS": "http://a:8089,http://b:8089/,c:8089",
    "REGISTRY_PEER_SECRET": "0123456789abcdef",
    "REGISTRY_PUSH": "http://b:8089",
}


def test_a_registry_with_a_disk_of_its_own(tmp_path: Path) -> None:
    assert registry({}).replicas is None
    assert registry({"COVEY_REGISTRY_MODE": "shared"}).replicas is None
    chosen = registry({"COVEY_" + name: value for name, value in _REPLICA.items()}).replicas
    assert chosen == settings.Replicas(
        write_only=False,
        own_url="http://a:8089",
        peers=("http://b:8089", "http://c:8089"),
        registry_peer_secret="0123456789abcdef",
        push_url="http://b:8089",
        push_copies=1,
        etcd=None,
    )
    file = tmp_path / "secret"
    file.write_text("fedcba9876543210\n")
    more = {"REGISTRY_PEER_SECRET": "", "REGISTRY_PEER_SECRET_FILE": str(file), "REGISTRY_MODE": "write-only"}
    more |= {"REGISTRY_PUSH": "", "ETCD_ENDPOINTS": "https://e:2379", "REGISTRY_PUSH_COPIES": "2"}
    chosen = registry({"COVEY_" + name: value for name, value in {**_REPLICA, **more}.items()}).replicas
    assert chosen is not None
    assert (chosen.write_only, chosen.registry_peer_secret, chosen.push_copies) == (True, "fedcba9876543210", 2)
    assert chosen.etcd is not None
    assert (chosen.etcd.etcd_endpoints, chosen.etcd.etcd_tls) == (("e:2379",), True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"REGISTRY_MODE": "raid"}, "'raid' is not one of: single, shared, replica, write-only"),
        ({"REGISTRY_MODE": ""}, "REGISTRY_PEERS is set but REGISTRY_MODE is single"),
        ({"REGISTRY_MODE": "shared"}, "REGISTRY_PEERS is set but REGISTRY_MODE is shared"),
        ({"REGISTRY_ADVERTISE_URL": ""}, "REGISTRY_ADVERTISE_URL names none: name the URL at which its peers"),
        ({"REGISTRY_ADVERTISE_URL": "http://a,http://b"}, "REGISTRY_ADVERTISE_URL=.* is more than one URL"),
        ({"REGISTRY_PEERS": "http://a:8089"}, "REGISTRY_PEERS names none: name the other servers"),
        ({"REGISTRY_PEER_SECRET": ""}, "REGISTRY_PEER_SECRET is not set, too short"),
        ({"REGISTRY_PEER_SECRET": "short"}, "REGISTRY_PEER_SECRET is not set, too short"),
        ({"REGISTRY_PEER_SECRET_FILE": "/dev/null"}, "are both set: unset one"),
        ({"REGISTRY_PUSH": ""}, "nobody says which registry takes pushes"),
        ({"REGISTRY_PUSH": "http://x"}, "REGISTRY_PUSH=http://x is none of the set: use one of http://a:8089, "),
        ({"ETCD_ENDPOINTS": "e:2379"}, "REGISTRY_PUSH and ETCD_ENDPOINTS are both set"),
        ({"REGISTRY_PUSH_COPIES": "4"}, "REGISTRY_PUSH_COPIES=4 is not 1 to 3"),
        ({"REGISTRY_PUSH_COPIES": "0"}, "REGISTRY_PUSH_COPIES=0 is not 1 to 3"),
        ({"BACKEND_TYPE": "s3"}, "BACKEND_TYPE is not disk: servers on one bucket share it"),
    ],
)
def test_replicas_that_cannot_work_stop_the_start(change: Mapping[str, str], text: str) -> None:
    given = {"COVEY_" + name: value for name, value in {**_REPLICA, **change}.items()}
    if "BACKEND_TYPE" in change:
        given["COVEY_BACKEND_S3_BUCKET"] = "b"
    with pytest.raises(errors.SettingError, match=text) as caught:
        registry(given)
    assert "0123456789abcdef" not in str(caught.value)


def test_the_all_in_one_services_registry_is_one_of_a_set() -> None:
    """Which server takes pushes its own etcd says, unless an operator does."""
    given = {"COVEY_" + name: value for name, value in _REPLICA.items()}
    assert (standalone().replicas, standalone().registry_mode) == (None, "single")
    for push in ("", "http://b:8089"):
        chosen = standalone({**given, "COVEY_REGISTRY_PUSH": push}).replicas
        assert chosen is not None
        assert (chosen.own_url, chosen.push_url, chosen.etcd) == ("http://a:8089", push, None)
    with pytest.raises(errors.SettingError, match="REGISTRY_PUSH=http://x is none of the set"):
        standalone({**given, "COVEY_REGISTRY_PUSH": "http://x"})
    with pytest.raises(errors.SettingError, match="REGISTRY_PEERS is set but REGISTRY_MODE is single"):
        standalone({**given, "COVEY_REGISTRY_MODE": ""})


def test_what_is_pushed_may_go_elsewhere() -> None:
    both = {"ANKA_ANKA_REGISTRY": "http://pull:1", "ANKA_PUSH_REGISTRY": "http://push:2"}
    assert controller(both).push_registries == ("http://push:2",)
    assert controller({"ANKA_ANKA_REGISTRY": "http://pull:1"}).push_registries == ("http://pull:1",)
    client = settings.client({"COVEY_CONFIG": "/dev/null", "COVEY_PUSH_REGISTRY": "http://push:2"})
    assert (client.registries, client.push_registries) == (("http://127.0.0.1:8089",), ("http://push:2",))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENABLE_AUTH", "false"),
        ("USE_HTTPS", "False"),
        ("ENABLE_METRICS", "0"),
        ("METRICS_PORT", "2112"),
        ("API_KEYS_SESSION_TTL", "300s"),
        ("OIDC_GROUPS_CLAIM", "groups"),
        ("CA_CERT", ""),
    ],
)
def test_switched_off_or_left_at_its_default_is_fine(name: str, value: str) -> None:
    assert controller({"ANKA_" + name: value}).notices == ()


def test_in_the_file_too(tmp_path: Path) -> None:
    file = tmp_path / "covey.toml"
    file.write_text("[controller]\nenable_auth = true\n")
    assert "covey.toml: [controller] enable_auth is set, but authentication" in refusal({"COVEY_CONFIG": str(file)})


@pytest.mark.parametrize("address", [":80", "0.0.0.0:8090", "[::]:8090", "10.0.0.1:8090"])
def test_reachable_from_outside_without_login_must_be_allowed(address: str) -> None:
    assert "COVEY_ALLOW_ANONYMOUS=true" in refusal({"ANKA_LISTEN_ADDR": address})
    allowed = controller({"ANKA_LISTEN_ADDR": address, "COVEY_ALLOW_ANONYMOUS": "true"})
    assert any("authentication is off" in notice for notice in allowed.notices)


def test_a_controller_wants_a_registry() -> None:
    with pytest.raises(errors.SettingError, match=r"ANKA_REGISTRY is not set.*ALLOW_EMPTY_REGISTRY=true"):
        settings.controller({"COVEY_CONFIG": "/dev/null"})


def test_no_priority_is_above_all() -> None:
    assert "PRIORITY is 21" in refusal({"COVEY_PRIORITY": "21"})


def test_a_login_wants_a_name() -> None:
    assert "ETCD_USERNAME is not set" in refusal({"COVEY_USE_ETCD_LOGIN": "true"})


def test_secrets_are_not_shown() -> None:
    chosen = registry({"COVEY_" + name: value for name, value in _REPLICA.items()})
    assert "0123456789abcdef" not in str(settings_reader.shown(chosen))
    assert "hunter" not in refusal({"COVEY_ROOT_TOKEN": "hunter2hunter2"})


@pytest.mark.parametrize("kept", ["5m", "0", "14m59s"])
def test_etcd_keeps_a_quarter_of_an_hour(kept: str) -> None:
    """(safety S28)"""
    with pytest.raises(errors.SettingError, match="AUTO_COMPACTION_RETENTION"):
        standalone({"ANKA_AUTO_COMPACTION_RETENTION": kept})


@pytest.mark.parametrize(("kept", "seconds"), [("15m", 900), ("1", 3600), ("30m", 1800)])
def test_etcds_own_way_of_writing_retention(kept: str, seconds: float) -> None:
    assert standalone({"ANKA_AUTO_COMPACTION_RETENTION": kept}).auto_compaction_retention_s == seconds


def test_compaction_by_revision_would_keep_no_time() -> None:
    with pytest.raises(errors.SettingError, match="AUTO_COMPACTION_MODE"):
        standalone({"COVEY_AUTO_COMPACTION_MODE": "revision"})


def test_many_nodes_in_one_process_are_synthetic() -> None:
    with pytest.raises(errors.SettingError, match="--hypervisor synthetic"):
        settings.agent({"COVEY_CONFIG": "/dev/null", "COVEY_NODES": "3"})
    assert settings.agent({"COVEY_CONFIG": "/dev/null", "COVEY_NODES": "3", "COVEY_HYPERVISOR": "synthetic"}).nodes == 3


# ---- what is only said ---------------------------------------------------------------------------------------------


def test_the_products_folders_are_accepted_and_said_once() -> None:
    chosen = settings.registry({"COVEY_CONFIG": "/dev/null", "ANKA_IMAGE_DIR_PATH": "/img", "ANKA_VM_DIR_PATH": "/vm"})
    assert chosen.notices == (
        "ANKA_IMAGE_DIR_PATH has no effect: Covey keeps all data of the registry below BASE_PATH",
        "ANKA_VM_DIR_PATH has no effect: Covey keeps all data of the registry below BASE_PATH",
    )


def test_an_unknown_variable_is_one_line_with_the_nearest_name() -> None:
    (notice,) = controller({"COVEY_INSTANCE_TIMEOUT": "2s"}).notices
    assert notice == "COVEY_INSTANCE_TIMEOUT is not a setting and is ignored; did you mean COVEY_INSTANCE_TIME_OUT?"
    (notice,) = controller({"COVEY_XYZZY": "2s"}).notices
    assert notice == "COVEY_XYZZY is not a setting and is ignored"


def test_what_kubernetes_adds_for_a_service_is_no_stranger() -> None:
    environ = {
        "COVEY_CONTROLLER_SERVICE_HOST": "10.0.0.1",
        "COVEY_CONTROLLER_SERVICE_PORT_HTTP": "80",
        "COVEY_CONTROLLER_PORT": "tcp://10.0.0.1:80",
        "COVEY_CONTROLLER_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert controller(environ).notices == ()


def test_an_unknown_key_in_the_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "covey.toml"
    file.write_text("[controller]\nheartbeet = '5s'\n")
    (notice,) = controller({"COVEY_CONFIG": str(file)}).notices
    assert notice == f"{file}: heartbeet is not a setting and is ignored; did you mean heartbeat?"


def test_another_programs_variable_is_not_ours_to_judge() -> None:
    assert controller({"COVEY_BACKEND_TYPE": "s3", "COVEY_IMAGE_DIR_PATH": "/x"}).notices == ()


# ---- the table itself ----------------------------------------------------------------------------------------------


def test_a_name_is_declared_once_per_program() -> None:
    seen = [(part, name) for row in settings_table.TABLE for part in row.parts for name in (row.name, *row.aliases)]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("row", settings_table.TABLE, ids=lambda row: row.name)
def test_every_setting_says_what_it_is(row: settings_table.Setting) -> None:
    assert row.doc.endswith(".")
    assert "\n" not in row.doc
