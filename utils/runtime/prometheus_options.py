"""Options of the HTTP server that Prometheus reads a run's metrics from."""

import os
import socket
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address

from utils.config.flag_rules import Resume
from utils.config.options import UserError, option, require

LARGEST_PORT = 65535


@dataclass(frozen=True)
class PrometheusOptions:
    """Where the metrics of a run are served while it trains."""

    prometheus_port: int | None = option(
        None,
        "serve the run's metrics for Prometheus at http://127.0.0.1:PORT/metrics; further processes of a machine serve "
        "their memory at PORT + their local rank",
        resume=Resume.REPORTING,
    )
    prometheus_address: str = option(
        "127.0.0.1",
        "address to serve the metrics on, without a password; 0.0.0.0: all of this machine's",
        is_text=True,
        resume=Resume.REPORTING,
        acts_with=("prometheus_port",),
    )

    def __post_init__(self) -> None:
        port, address = self.prometheus_port, self.prometheus_address
        if port is not None:
            require(0 < port <= LARGEST_PORT, "prometheus_port", port, f"be from 1 to {LARGEST_PORT}")
        if address != "localhost":
            try:
                ip_address(address)
            except ValueError as error:
                raise UserError(
                    f"--prometheus_address must be an IP address, such as 127.0.0.1 or 0.0.0.0, got {address!r}"
                ) from error

    @property
    def port(self) -> int:
        """The port of this process: the given one plus the local rank."""
        return (self.prometheus_port or 0) + int(os.environ.get("LOCAL_RANK", "0"))


def check_server(options: PrometheusOptions) -> None:
    """Refuses a server whose package is missing, or whose port is in use or not this user's to open.

    Raises:
        UserError: if so.
    """
    if options.prometheus_port is None:
        return
    if find_spec("prometheus_client") is None:
        raise UserError(f"--prometheus_port {options.port} needs prometheus_client; pip install prometheus_client")
    address = options.prometheus_address
    try:
        family, *_, place = socket.getaddrinfo(address, options.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
            tried.listen()
    except (OSError, OverflowError) as error:
        raise not_served(options, error) from error


def not_served(options: PrometheusOptions, error: Exception) -> UserError:
    """Returns the error of an address that can't be listened on."""
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"--prometheus_port {options.port} can't be served on {options.prometheus_address}: {reason}; give another "
        "port, or an address of this machine as --prometheus_address"
    )
