"""Problem types: slug, status, title, meaning and remedy of everything that can go wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemType:
    """One problem type: HTTP status, title, what it means and what to do, as its page says it."""

    status: int
    title: str
    meaning: str
    remedy: str


def _type(status: int, title: str, meaning: str, remedy: str) -> ProblemType:
    return ProblemType(status=status, title=title, meaning=meaning, remedy=remedy)


PROBLEMS: dict[str, ProblemType] = {
    "invalid-request": _type(
        422,
        "The request is not valid",
        "A parameter, header or body is missing, malformed or out of range.",
        "Read `detail`, which names the field, and correct it.",
    ),
    "unsupported-media-type": _type(
        415,
        "The media type is not supported",
        "The body, or one image in it, is of a kind that this service does not take.",
        "Send JPEG, PNG or WebP, as multipart field `images`, as a raw `image/*` body or as base64 in JSON.",
    ),
    "image-unreadable": _type(
        422,
        "The image cannot be read",
        "The bytes are no image, or the file is damaged or cut off.",
        "Open the file in an image viewer, save it anew, and send it again.",
    ),
    "image-too-large": _type(
        413,
        "The image is too large",
        "The image has more bytes or more pixels than this service takes.",
        "Scale the image down. Classification needs a few hundred pixels a side at most.",
    ),
    "body-too-large": _type(
        413,
        "The body is too large",
        "The request body has more bytes than this service takes.",
        "Send fewer images a call.",
    ),
    "too-many-images": _type(
        413,
        "Too many images in one call",
        "The call holds more images than this service takes at once.",
        "Send them in several calls.",
    ),
    "not-found": _type(404, "Nothing is here", "No route has this path.", "Look into `/docs` for the routes."),
    "method-not-allowed": _type(
        405,
        "The method is not allowed here",
        "The path exists, but not with this method.",
        "Use a method that the `Allow` header names.",
    ),
    "unknown-tenant": _type(
        404, "The tenant is unknown", "No tenant has this name.", "Create it with `PUT /tenants/{tenant}`."
    ),
    "unknown-class": _type(
        404,
        "The class is unknown",
        "The tenant has no class of this name. Names are compared exactly.",
        "List the classes with `GET /tenants/{tenant}`, or add one.",
    ),
    "unknown-shot": _type(
        404, "The shot is unknown", "No shot has this id.", "List the shots with `GET /memory/static`."
    ),
    "unknown-slot": _type(
        404,
        "The slot is unknown",
        "The class holds no slot of this id; it may have been replaced since.",
        "List the slots with `GET /memory/dynamic/{class}`.",
    ),
    "unknown-job": _type(404, "The job is unknown", "No job has this id.", "Start it again."),
    "unknown-snapshot": _type(
        404, "The snapshot is unknown", "No snapshot has this id.", "List them with `GET /admin/memory/snapshots`."
    ),
    "no-classes": _type(
        409,
        "The tenant has no classes yet",
        "An image can be classified only among classes, and this tenant has none.",
        "Give it classes with `PUT /tenants/{tenant}`.",
    ),
    "duplicate-class": _type(
        422,
        "A class is named twice",
        "Two classes of one tenant have the same name.",
        "Leave one of them out, or name it otherwise.",
    ),
    "limit-exceeded": _type(
        422,
        "A limit is exceeded",
        "The request would hold more classes, prompts, shots, slots or bytes than a tenant may have.",
        "Read `detail` for the limit; remove something, or have the operator raise it.",
    ),
    "fingerprint-mismatch": _type(
        409,
        "The memory belongs to another encoder",
        "Features of two encoders cannot be compared, so memories of one are never read with the other.",
        "Serve with the encoder that `detail` names; or `PUT /tenants/{tenant}` anew: shots whose images are kept are "
        "read by the new encoder, and the dynamic memory starts afresh.",
    ),
    "idempotency-conflict": _type(
        422,
        "The idempotency key was used for another request",
        "A key stands for one request; this one differs from the first.",
        "Use a fresh `Idempotency-Key` for each request, and the same one only for its retries.",
    ),
    "unauthenticated": _type(
        401, "No valid key was given", "This service asks for an API key.", "Send `Authorization: Bearer KEY`."
    ),
    "forbidden": _type(
        403,
        "This call is not allowed",
        "The key is valid, but not for this call; or, where no key is needed, a web page elsewhere may have sent it.",
        "Use a key with the scope. Without keys, call an address or localhost, or have DMN_OPEN_HOSTS list the name.",
    ),
    "rate-limited": _type(
        429,
        "The caller is over its limit",
        "This tenant has sent more images a second, or has more of them at work, than it may.",
        "Wait for `Retry-After` seconds and send again, fewer images at a time; or have the operator raise the limit.",
    ),
    "queue-full": _type(
        503,
        "The server is full",
        "More images are waiting than the server takes in, or than it can answer soon.",
        "Wait for `Retry-After` seconds and send again.",
    ),
    "draining": _type(
        503, "The server is going down", "It finishes what it has and takes nothing new.", "Send it to another one."
    ),
    "store-down": _type(
        503,
        "The memory store cannot be reached",
        "Memories live in a store, and it does not answer.",
        "Wait for `Retry-After` seconds and send again; tell the operator if it lasts.",
    ),
    "deadline-exceeded": _type(
        504,
        "The deadline has passed",
        "The answer would have come later than `X-Deadline-Ms`, or the server's own limit, allows.",
        "Allow more time, or send fewer images a call.",
    ),
    "internal": _type(
        500,
        "Something went wrong inside",
        "This is a fault of the service, not of the request.",
        "Report it with its `request_id`.",
    ),
}
"""Every problem type by its slug, which ends its URI `/problems/<slug>`."""
