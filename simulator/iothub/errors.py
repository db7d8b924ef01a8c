"""How the hub refuses: an HTTP status for every protocol it speaks."""

from __future__ import annotations


class HubError(Exception):
    """A refused request: `status` as HTTP (twin responses over MQTT carry the same numbers).

    `code` is IoT Hub's error code such as "DeviceNotFound".
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def as_json(self) -> dict[str, str]:
        return {"Message": f"ErrorCode:{self.code};{self.message}", "ExceptionMessage": ""}


def invalid(message: str) -> HubError:
    return HubError(400, "ArgumentInvalid", message)


def unauthorized(message: str) -> HubError:
    return HubError(401, "IotHubUnauthorizedAccess", message)
