"""Certificates made for one run of the tests: an authority, and servers' certificates that are good or bad in one way.

Nothing of this is a secret and nothing is kept: the keys live in the directory given, which the tests delete.
"""

import datetime
import ipaddress
from pathlib import Path
from typing import Final, Literal, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Kind: TypeAlias = Literal["good", "expired", "other-name", "self-signed"]

_DAY: Final = datetime.timedelta(days=1)
_LOCAL: Final[tuple[x509.GeneralName, ...]] = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
)


class Certificates:
    """PEM files in `directory`, each made when it is first asked for. Certificates and keys are in one file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forkd's test authority")])
        self._authority = _sign(self._name, self._key, self._name, self._key, authority=True)
        self.ca_file: Final = directory / "ca.pem"
        self.ca_file.write_bytes(_pem(self._authority))

    def server(self, kind: Kind = "good") -> Path:
        """A server's certificate for localhost, 127.0.0.1 and ::1, or one with the fault its name says."""
        file = self._directory / f"{kind}.pem"
        if not file.exists():
            file.write_bytes(self._make(kind))
        return file

    def _make(self, kind: Kind) -> bytes:
        key = ec.generate_private_key(ec.SECP256R1())
        host = "elsewhere.example" if kind == "other-name" else "localhost"
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        certificate = _sign(
            name,
            key,
            *((name, key) if kind == "self-signed" else (self._name, self._key)),
            names=(x509.DNSName(host),) if kind == "other-name" else _LOCAL,
            ended=kind == "expired",
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return _pem(certificate) + private


def _sign(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    authority: bool = False,
    names: tuple[x509.GeneralName, ...] = (),
    ended: bool = False,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 30 * _DAY)
        .not_valid_after(now - _DAY if ended else now + 30 * _DAY)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if authority:
        builder = builder.add_extension(_signs_certificates(), critical=True)
    else:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _signs_certificates() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
