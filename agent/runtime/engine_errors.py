"""What an engine's refusals mean, and what to do about them."""

from __future__ import annotations

import re

from .container import RuntimeFailed

# (what the engine says, whether it may work later, what to do)
_KNOWN: tuple[tuple[str, bool, str], ...] = (
    (
        r"no space left on device",
        True,
        "free space on the engine's disk; 'docker system df' shows what is used",
    ),
    (
        r"server gave http response to https client",
        True,
        'the registry has no TLS: add {host} to "insecure-registries" in /etc/docker/daemon.json '
        "and restart the engine",
    ),
    (
        r"x509: certificate signed by unknown authority|x509: certificate is not trusted",
        True,
        "put the authority's certificate into /etc/docker/certs.d/{host}/ca.crt: the engine does "
        "not read registry.ca-file",
    ),
    (r"x509: ", True, "check the certificate of {host} and the clock of this device"),
    (
        r"unauthorized|no basic auth credentials|authentication required|access .* denied",
        True,
        "check username and password for {host} in registryCredentials or [[registry]]",
    ),
    (
        r"manifest unknown|manifest for .* not found|name unknown|repository .* not found",
        True,
        "push the image, or correct its name in the manifest",
    ),
    (r"toomanyrequests|too many requests", True, "the registry limits requests; it is tried later"),
    (
        r"no matching manifest for",
        False,
        "push the image for this machine's architecture too",
    ),
    (r"exec format error", False, "the image is for another architecture: push one for this"),
    (
        r"executable file not found|exec: .*: no such file or directory|exec: .*permission denied",
        False,
        "correct Cmd and Entrypoint, or the image",
    ),
    (
        r"port is already allocated|address already in use",
        True,
        "something else on this device has the port: change PortBindings or stop it",
    ),
    (
        r"could not select device driver",
        False,
        "the engine has no driver for DeviceRequests: install it, such as nvidia-container-toolkit",
    ),
    (
        r"bind source path does not exist",
        True,
        "make the folder on this device, or correct the mount",
    ),
    (
        r"logging driver does not support reading",
        False,
        "set HostConfig.LogConfig of the module to json-file, local or journald",
    ),
    (
        r"verification failed for digest|filesystem layer verification failed",
        True,
        "the registry's copy is damaged: push the image again",
    ),
    (r"network .* not found", True, "make the network, or name it as docker.network"),
    (
        r"invalid reference format|invalid repository name",
        False,
        "correct the image's name in the manifest",
    ),
    (
        r"connection refused|i/o timeout|no such host|network is unreachable|tls handshake timeout"
        r"|connection reset|no route to host|eof",
        True,
        "check the network and that {host} runs",
    ),
)


def explained(
    doing: str, said: str, *, status: int | None = None, host: str = "the registry"
) -> RuntimeFailed:
    """The failure of `doing`, of which the engine said `said` with HTTP `status` (None: in a
    stream)."""
    text = " ".join(said.split())[:600] or f"status {status}"
    for pattern, retryable, remedy in _KNOWN:
        if re.search(pattern, text, re.IGNORECASE):
            return RuntimeFailed(
                f"cannot {doing}: {text}; {remedy.format(host=host)}", retryable=retryable
            )
    # 409: something else is being done with it. 5xx: the engine's trouble, not the request's.
    retryable = status is None or status in (408, 409, 429) or status >= 500
    return RuntimeFailed(f"cannot {doing}: {text}", retryable=retryable)


def unreachable(doing: str, socket: str, reason: str) -> RuntimeFailed:
    """No answer from the engine at `socket`."""
    text = " ".join(reason.split())
    if "permission denied" in text.lower():
        remedy = "let the agent's user open it, for example by the docker group"
    elif "timed out" in text.lower():
        remedy = "the engine is stuck or very busy: see its log ('journalctl -u docker')"
    else:
        remedy = "start the engine ('systemctl start docker'), or correct docker.socket"
    return RuntimeFailed(
        f"cannot {doing}: no answer from the engine at {socket} ({text[:200]}); {remedy}",
        retryable=True,
    )
