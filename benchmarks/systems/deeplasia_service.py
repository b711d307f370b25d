"""Deeplasia's public HTTP service (CC BY-NC-SA 4.0; weights on request from its authors)."""

import http.client
import io
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any

import pandas as pd

from boneage_hf.errors import InputError
from boneage_hf.prepared import without_decoding
from boneage_hf.radiograph import read

from .base import System, SystemOptions, sexes_of

#: Seconds before the second and the third try.
PAUSES = (1.0, 5.0)
TIMEOUT_SECONDS = 120.0


class DeeplasiaServiceSystem(System):
    """Sends every image with its sex to `POST /predict` and reads months.

    Interface as in the service's OpenAPI file: form fields `file`, `sex` (without it the service guesses: it is always
    sent), `use_mask` and `use_invChecker` at their default of True, `mask_crop` at 1.15.

    Args:
        url: such as http://localhost:8080.
        timeout_seconds: per request.
        pauses: seconds to wait before each repetition; only what may pass is repeated: no connection, a time-out, 5xx.
    """

    name = "Deeplasia (service)"
    preprocessing = "as stored, sent as PNG; the service masks, crops (1.15) and checks inversion"
    # Rassmann et al. (10.1007/s00247-023-05789-1) trained on the RSNA data; which of the labelled images served for
    # choosing is not known here, so a result on either part is flagged.
    uses_sex = True
    trained_on = ("rsna-training-12611", "rsna-validation-1425")

    def __init__(
        self, url: str, *, timeout_seconds: float = TIMEOUT_SECONDS, pauses: tuple[float, ...] = PAUSES
    ) -> None:
        try:
            scheme = urllib.parse.urlsplit(url).scheme
        except ValueError:  # an IPv6 address without its closing bracket
            raise InputError("the address of the service is no URL; write it as http://localhost:8080.") from None
        if scheme not in ("http", "https"):
            raise InputError("the address of the service must begin with http:// or https://.")
        self.url, self.timeout_seconds, self.pauses = url.rstrip("/"), timeout_seconds, pauses
        # The service does not tell its version; its settings are what is known to decide a prediction.
        self.revision = "unknown; use_mask True, use_invChecker True, mask_crop 1.15"

    @classmethod
    def build(cls, argument: str, options: SystemOptions) -> "DeeplasiaServiceSystem":
        """`argument`: the address, by default http://localhost:8080. It must answer `GET /ping`."""
        system = cls(argument or "http://localhost:8080")
        system.ping()
        return system

    def ping(self) -> None:
        """Raises `InputError` if no service answers."""
        self._request(urllib.request.Request(f"{self.url}/ping"), "the check of the service")

    def predict(self, dataset: Any) -> pd.DataFrame:
        undecoded = without_decoding(dataset)
        months = [
            self._predict_one(image["bytes"], sex, f"image {row_id}")
            for row_id, image, sex in zip(undecoded["id"], undecoded["image"], sexes_of(undecoded), strict=True)
        ]
        return pd.DataFrame({"id": undecoded["id"], "predicted_months": months})

    def _predict_one(self, content: bytes, sex: str, what: str) -> float:
        buffer = io.BytesIO()
        read(content).image.save(buffer, format="PNG")
        fields = {"sex": sex, "use_mask": "True", "use_invChecker": "True", "mask_crop": "1.15"}
        body, content_type = multipart(fields, buffer.getvalue())
        request = urllib.request.Request(
            f"{self.url}/predict", data=body, headers={"Content-Type": content_type}, method="POST"
        )
        # Not within the `try`: its InputError is a ValueError too.
        content_of_answer = self._request(request, what)
        try:
            answer = json.loads(content_of_answer)
            months, used_sex = float(answer["bone_age"]), answer.get("used_sex")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{what}: the service answered without a bone_age; check that it is Deeplasia's."
            ) from None
        if used_sex != sex:
            raise InputError(f"{what}: the service did not use the sex that was sent; check its version.")
        if not math.isfinite(months):
            raise InputError(f"{what}: the service answered with a bone age that is no number; check its log.")
        return months

    def _request(self, request: urllib.request.Request, what: str) -> bytes:
        for pause in (*self.pauses, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                status = error.code
                error.close()
                if status < 500:
                    raise InputError(f"{what}: the service refused it (HTTP {status}); check its input.") from None
                reason = f"the service failed (HTTP {status}); see its log"
            except TimeoutError:
                reason = f"the service did not answer in {self.timeout_seconds:g} s; see whether it is overloaded"
            except (OSError, http.client.HTTPException):
                reason = "the service cannot be reached; start it, or give its address as deeplasia-service:URL"
            if pause is not None:
                time.sleep(pause)
        raise InputError(f"{what}: {reason}. It was tried {len(self.pauses) + 1} times.")


def multipart(fields: dict[str, str], png: bytes) -> tuple[bytes, str]:
    """A body of multipart/form-data (RFC 7578) with these fields and a PNG as `file`, and its content type.

    The file is sent under a name that says nothing about a person.
    """
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="hand.png"\r\n'
        "Content-Type: image/png\r\n\r\n".encode()
    )
    return b"".join([*parts, png, f"\r\n--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"
