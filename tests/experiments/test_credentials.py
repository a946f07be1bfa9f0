"""Keys of a deployment: who is vouched for, under which names, with which modes; and that adding clients changes nothing."""

import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from experiments import credentials
from experiments.credentials import make_credentials
from fedattack.errors import FedattackError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("made") / "credentials"
    make_credentials(made, 2, days=30, hosts=["fl.example", "192.0.2.7"])
    return made


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_private_files_are_for_their_owner_only(folder) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    private = [path for path in folder.iterdir() if path.suffix in (".key", ".secret", ".ecdsa", ".token")]
    assert len(private) == 1 + 1 + 2 * 3 + 2  # authority; Ray; key and secret of 3 servers; 2 node keys
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}


@pytest.mark.parametrize("name", ["superlink", "supernode-0", "supernode-1"])
def test_every_server_has_a_certificate_of_the_authority_in_its_own_names(folder, name) -> None:
    authority, found = certificate(folder / "ca.pem"), certificate(folder / f"{name}.pem")
    found.verify_directly_issued_by(authority)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}
    assert hosts == {name, "localhost", "127.0.0.1"} | ({"fl.example", "192.0.2.7"} if name == "superlink" else set())
    assert found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    until = found.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=29) < until <= timedelta(days=30)
    key = load_pem_private_key((folder / f"{name}.key").read_bytes(), None)
    assert key.public_key() == found.public_key()
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")


def test_node_keys_are_in_the_format_that_flower_reads(folder) -> None:
    for client in (0, 1):
        private = load_ssh_private_key((folder / f"supernode-{client}.ecdsa").read_bytes(), None)
        public = load_ssh_public_key((folder / f"supernode-{client}.ecdsa.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.curve.name == "secp384r1"
        assert private.public_key() == public


def test_nothing_is_shared(folder) -> None:
    files = [path for path in folder.iterdir() if path.suffix != ".pub"]
    assert len({path.read_bytes() for path in files}) == len(files)


def test_more_clients_leave_what_is_there_and_are_vouched_for_by_the_same_authority(tmp_path) -> None:
    make_credentials(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_credentials(tmp_path, 3)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    certificate(tmp_path / "supernode-2.pem").verify_directly_issued_by(certificate(tmp_path / "ca.pem"))


class LongAgo(datetime):
    """A clock that is 20 days behind."""

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) - timedelta(days=20)


def test_certificates_that_expired_are_renewed_with_their_names_and_the_others_kept(tmp_path, monkeypatch) -> None:
    make_credentials(tmp_path, 1)
    for name in ("superlink.pem", "supernode-0.pem"):
        (tmp_path / name).unlink()
    with monkeypatch.context() as past:
        past.setattr(credentials, "datetime", LongAgo)
        make_credentials(tmp_path, 1, days=19, hosts=["fl.example", "192.0.2.7"])
    make_credentials(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = certificate(tmp_path / "superlink.pem")
    assert found.not_valid_after_utc - datetime.now(UTC) > timedelta(days=364)
    found.verify_directly_issued_by(certificate(tmp_path / "ca.pem"))
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(name.value) for name in names} == {"superlink", "localhost", "127.0.0.1", "fl.example", "192.0.2.7"}
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "superlink.pem", tmp_path / "superlink.key")
    make_credentials(tmp_path, 2)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before  # now nothing is expired


def test_an_authority_that_expired_is_refused_with_the_way_out(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as past:
        past.setattr(credentials, "datetime", LongAgo)
        make_credentials(tmp_path, 1, days=19)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FedattackError, match=r"ca\.pem expired on \d{4}-\d\d-\d\d: remove every \.pem and \.key"):
        make_credentials(tmp_path, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for path in (*tmp_path.glob("*.pem"), *tmp_path.glob("*.key")):
        path.unlink()
    make_credentials(tmp_path, 1)
    certificate(tmp_path / "superlink.pem").verify_directly_issued_by(certificate(tmp_path / "ca.pem"))
    assert (tmp_path / "supernode-0.ecdsa").read_bytes() == before["supernode-0.ecdsa"]


def test_another_authority_vouches_for_nothing(folder, tmp_path) -> None:
    make_credentials(tmp_path, 1)
    with pytest.raises(InvalidSignature):
        certificate(folder / "superlink.pem").verify_directly_issued_by(certificate(tmp_path / "ca.pem"))


def test_a_lost_authority_and_absurd_numbers_are_refused(tmp_path) -> None:
    make_credentials(tmp_path, 1)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(FedattackError, match=r"not the ca\.key"):
        make_credentials(tmp_path, 2)
    for wrong in ({"clients": 0}, {"clients": 1, "days": 0}):
        with pytest.raises(FedattackError, match="at least 1"):
            make_credentials(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_the_module_is_a_command(tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "experiments.credentials",
        str(tmp_path / "keys"),
        "--clients",
        "1",
        "--host",
        "me",
    ]
    subprocess.run(command, check=True, timeout=60)
    public = certificate(tmp_path / "keys" / "superlink.pem").public_bytes(Encoding.PEM)
    assert public.startswith(b"-----BEGIN CERTIFICATE")
    key = load_ssh_public_key((tmp_path / "keys" / "supernode-0.ecdsa.pub").read_bytes())
    assert key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).startswith(b"ecdsa-sha2-nistp384 ")
