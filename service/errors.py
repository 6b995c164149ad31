"""What a call may be refused for, by the arrow of the walk that fails; each with its problem type.

bytes ──porch──> request     InvalidRequest BodyTooLarge TooManyImages NotFound MethodNotAllowed UnsupportedMediaType
request ──gate──> tenant     Unauthenticated Forbidden RateLimited UnknownTenant
bytes ──darkroom──> pixels   the tree of service.images: unsupported-media-type, image-unreadable, image-too-large
pixels ──shuttle──> query    QueueFull Draining DeadlineExceeded
tenant ──archive──> memory   StoreDown (StoreAway, Contended) FingerprintMismatch NoClasses
config, shots, slots         DuplicateClass LimitExceeded UnknownClass UnknownShot UnknownSlot IdempotencyConflict
jobs, snapshots              UnknownJob UnknownSnapshot
anything else                Internal, without a detail that could leak
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ServiceError(Exception):
    """Base of every refusal; `detail` is one or more sentences for people, `retry_after_s` where waiting helps."""

    slug: ClassVar[str] = "internal"

    def __init__(self, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class InvalidRequest(ServiceError):
    """A parameter, header or body does not fit."""

    slug = "invalid-request"


class UnsupportedBody(ServiceError):
    """The body's content type is none that the route takes."""

    slug = "unsupported-media-type"


class BodyTooLarge(ServiceError):
    """The body has too many bytes."""

    slug = "body-too-large"


class TooManyImages(ServiceError):
    """The call holds too many images."""

    slug = "too-many-images"


class NotFound(ServiceError):
    """No route has the path."""

    slug = "not-found"


class UnknownTenant(ServiceError):
    """No tenant has the name."""

    slug = "unknown-tenant"


class UnknownClass(ServiceError):
    """The tenant has no class of the name."""

    slug = "unknown-class"


class UnknownShot(ServiceError):
    """No shot has the id."""

    slug = "unknown-shot"


class UnknownSlot(ServiceError):
    """The class holds no slot of the id."""

    slug = "unknown-slot"


class UnknownJob(ServiceError):
    """No job has the id."""

    slug = "unknown-job"


class UnknownSnapshot(ServiceError):
    """No snapshot has the id."""

    slug = "unknown-snapshot"


class NoClasses(ServiceError):
    """The tenant has no classes."""

    slug = "no-classes"


class DuplicateClass(ServiceError):
    """A class is named twice."""

    slug = "duplicate-class"


class LimitExceeded(ServiceError):
    """The tenant would hold more than it may."""

    slug = "limit-exceeded"


class FingerprintMismatch(ServiceError):
    """The memory was made with another encoder."""

    slug = "fingerprint-mismatch"


class IdempotencyConflict(ServiceError):
    """The key was used for another request."""

    slug = "idempotency-conflict"


class Unauthenticated(ServiceError):
    """The call has no key, or none that is valid."""

    slug = "unauthenticated"


class Forbidden(ServiceError):
    """The caller may not make this call: its key is for others, or a web page of another site may have sent it."""

    slug = "forbidden"


class RateLimited(ServiceError):
    """The tenant sends more than its share; `headers` say more of it."""

    slug = "rate-limited"

    def __init__(
        self, detail: str, *, retry_after_s: float | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.headers = headers


class QueueFull(ServiceError):
    """More images wait than the server takes in, or longer than they may."""

    slug = "queue-full"


class Draining(ServiceError):
    """The server is going down."""

    slug = "draining"


class StoreDown(ServiceError):
    """The store does not do what it is asked."""

    slug = "store-down"


class StoreAway(StoreDown):
    """The store does not answer at all."""


class Contended(StoreDown):
    """The store answers, but others change the same tenant again and again."""

    def __init__(self) -> None:
        super().__init__("The tenant keeps changing under the call.", retry_after_s=1.0)


class DeadlineExceeded(ServiceError):
    """The answer would come too late."""

    slug = "deadline-exceeded"


class Internal(ServiceError):
    """A fault of ours."""

    slug = "internal"
