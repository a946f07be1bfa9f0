"""Keys of a deployment, as files: an authority, a certificate for each server, a key for each node, secrets of the SuperExecs.

    python -m experiments.credentials FOLDER --clients 4

    ca.pem  ca.key                          the authority; ca.key signs only and is given to no component
    superlink.pem .key .secret              the SuperLink's certificate and key; what its SuperExec proves itself with
    supernode-3.pem .key .secret            the same of client 3's SuperNode
    supernode-3.ecdsa .ecdsa.pub            client 3's identity: the SuperLink admits registered public keys only
    ray.token                               what machines and drivers of the attacks' Ray cluster prove themselves with

What is in the folder already is kept, so more clients can be added later; a server's certificate that has expired is renewed,
with the names it had. Start the component again then. Private files have mode 0600. Every component has
its own certificate and secret: a client's keys open nothing but that client. Keys are P-256 (TLS) and P-384 (nodes, in
OpenSSH's format, the only one that Flower reads).
"""

import argparse
import ipaddress
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedattack.errors import FedattackError, must
from fedattack.store import private_folder, write_atomically

LOCAL = ("localhost", "127.0.0.1")
"""Every certificate is good for these, beside the component's own name."""


def make_credentials(folder: Path, clients: int, *, days: int = 365, hosts: Sequence[str] = ()) -> None:
    """Whatever a deployment of this many clients needs and the folder does not hold yet, or holds but expired.

    hosts: further names or addresses under which the SuperLink is reached (subject alternative names of its certificate).
    Raises FedattackError where the authority itself has expired: everybody who trusts it must be given another.
    """
    if clients < 1:
        raise FedattackError(must("clients", "at least 1", clients))
    if days < 1:
        raise FedattackError(must("days", "at least 1", days))
    private_folder(folder)
    authority = _authority(folder, days)
    _server(folder, "superlink", authority, days, hosts)
    if not (folder / "ray.token").exists():
        _write_private(folder / "ray.token", secrets.token_hex(32).encode())
    for client in range(clients):
        name = f"supernode-{client}"
        _server(folder, name, authority, days, ())
        _identity(folder / f"{name}.ecdsa")


Authority = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]


def _authority(folder: Path, days: int) -> Authority:
    key_file, certificate_file = folder / "ca.key", folder / "ca.pem"
    if key_file.exists() and certificate_file.exists():
        key = load_pem_private_key(key_file.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise FedattackError(must(str(key_file), "an elliptic-curve key", type(key).__name__))
        authority = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        if _expired(authority):
            raise FedattackError(
                f"{certificate_file} expired on {authority.not_valid_after_utc:%Y-%m-%d}: remove every .pem and .key from "
                "its folder (node keys and secrets may stay), make credentials again, and hand out the new ones"
            )
        return key, authority
    if left := sorted(folder.glob("super*.pem")):
        raise FedattackError(
            f"{folder} holds {left[0].name} but not the ca.key that signed it: start with an empty folder"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedattack deployment")])
    certificate = (
        _certificate(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, SHA256())
    )
    _write_private(key_file, _pem(key))
    write_atomically(certificate_file, certificate.public_bytes(Encoding.PEM))
    return key, certificate


def _server(folder: Path, name: str, authority: Authority, days: int, hosts: Sequence[str]) -> None:
    """Certificate, key and SuperExec secret of a component that others connect to."""
    signing_key, signer = authority
    path = folder / f"{name}.pem"
    kept = x509.load_pem_x509_certificate(path.read_bytes()) if path.exists() else None
    if kept is None or _expired(kept):
        key = ec.generate_private_key(ec.SECP256R1())
        names = dict.fromkeys((name, *LOCAL, *_names_of(kept), *hosts))
        certificate = (
            _certificate(
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), signer.subject, key.public_key(), days
            )
            .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(signing_key, SHA256())
        )
        _write_private(folder / f"{name}.key", _pem(key))
        write_atomically(path, certificate.public_bytes(Encoding.PEM))
    if not (folder / f"{name}.secret").exists():
        _write_private(folder / f"{name}.secret", secrets.token_bytes(32))


def _expired(certificate: x509.Certificate) -> bool:
    return certificate.not_valid_after_utc <= datetime.now(UTC)


def _names_of(certificate: x509.Certificate | None) -> list[str]:
    """Subject alternative names, addresses included."""
    if certificate is None:
        return []
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def _identity(path: Path) -> None:
    if path.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_atomically(path.with_name(path.name + ".pub"), public + b"\n")
    _write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks of other machines may be behind
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_private(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    with path.open("wb") as file:
        file.write(content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Keys of a deployment; what is in the folder already is kept.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--days", type=int, default=365, help="how long certificates are valid")
    parser.add_argument("--host", action="append", default=[], help="another name or address of the SuperLink")
    given = parser.parse_args()
    make_credentials(given.folder, given.clients, days=given.days, hosts=given.host)
