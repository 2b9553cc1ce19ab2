"""Label Studio's labelling configuration, and the images of its tasks."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener
from xml.etree import ElementTree

from open_gem.errors import InputError
from open_gem.export.label_studio import TAGS, host_of, quoted
from open_gem.files import to_json
from open_gem.localization import PRESENCE
from open_gem.serve.errors import RequestError
from open_gem.serve.uploads import DATA_URI, from_base64
from open_gem.text import without_article

KINDS = {tag: kind for kind, tag in TAGS.items()}
SECONDS = 20  # timeout of a request to Label Studio


class Control(NamedTuple):
    """A tag of labels over an image.

    kind      a key of `export.label_studio.TAGS`
    name      what regions come from
    to        the name of the image's tag
    key       of a task's data that has the image
    labels    each with its prompts
    presence  labels with a lower presence have no regions
    """

    kind: str
    name: str
    to: str
    key: str
    labels: Mapping[str, tuple[str, ...]]
    presence: float


def controls_of(config: str) -> list[Control]:
    """Return the controls that regions can be made for, in the order of the configuration; if it has several images,
    those of the first that has any. Raises RequestError if it cannot be read, or has none."""
    if re.search(r"<!(DOCTYPE|ENTITY)", config, re.IGNORECASE):
        raise RequestError(422, "label_config is not a labelling configuration")
    try:
        root = ElementTree.fromstring(config)
    except ElementTree.ParseError as error:
        raise RequestError(422, f"label_config cannot be read: {error}") from error
    images = {tag.get("name"): tag.get("value", "").lstrip("$") for tag in root.iter("Image")}
    controls = [control for tag in root.iter() if (control := _control(tag, images)) and control.labels]
    if not controls:
        tags = ", ".join(KINDS)
        raise RequestError(422, f"label_config has no labels over an image, expected one of {tags} and an Image")
    controls = [control for control in controls if control.to == controls[0].to]
    if any(control.kind == "brush" for control in controls) and find_spec("label_studio_sdk") is None:
        raise RequestError(422, "BrushLabels need label-studio-sdk beside the server: pip install label-studio-sdk")
    return controls


def _control(tag: ElementTree.Element, images: Mapping[str | None, str]) -> Control | None:
    to, kind = tag.get("toName"), KINDS.get(tag.tag)
    if kind is None or to is None or to not in images:
        return None
    labels = dict(map(_label, tag.iter("Label")))
    presence = _presence(tag.get("model_score_threshold", ""))
    return Control(kind, tag.get("name", ""), to, images[to], labels, presence)


def _label(tag: ElementTree.Element) -> tuple[str, tuple[str, ...]]:
    """Return a label and its prompts: those of `predicted_values`, as Label Studio's own examples have it, or its
    name."""
    name = tag.get("value", "")
    prompts = tuple(prompt.strip() for prompt in tag.get("predicted_values", "").split(",") if prompt.strip())
    return name, prompts or (name,)


def _presence(text: str) -> float:
    """Return a threshold in [0, 1]; the default for anything else."""
    try:
        presence = float(text)
    except ValueError:
        return PRESENCE
    return presence if 0 <= presence <= 1 else PRESENCE


# Images ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The Label Studio whose images may be fetched; no other address is ever fetched.

    url    such as "http://localhost:8080"
    token  of a user: a legacy token, or a personal access token

    Raises InputError for a url that is none.
    """

    url: str
    token: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InputError(f"Label Studio's url is {self.url!r}, expected for example http://localhost:8080")

    def fetch(self, address: str, max_bytes: int) -> bytes:
        """Fetch the image of a task: below `/data/` of this Label Studio, at most `max_bytes`. Raises RequestError."""
        path = self._path(address)
        return self._get(path, {"Authorization": self._authorization()}, max_bytes)

    def _path(self, address: str) -> str:
        """Return the address below this server's own. Raises RequestError for any other."""
        base = urlsplit(self.url)
        host = host_of(address)
        path = address.removeprefix(host)
        below = base.path.rstrip("/")  # addresses of Label Studio may lack the path of its URL
        if path.startswith(f"{below}/data/"):
            path = path.removeprefix(below)
        elif host:
            path = ""
        plain = unquote(unquote(path.partition("?")[0]))
        is_ours = host.lower() in ("", f"{base.scheme}://{base.netloc}".lower()) and plain.startswith("/data/")
        climbs = ".." in plain.split("/") or "\\" in plain
        if not is_ours or climbs or re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
            raise RequestError(422, "the image is neither a data: URI nor a file that Label Studio itself serves")
        return quoted(path).replace("#", "%23")

    def _authorization(self) -> str:
        if self.token.count(".") != 2:
            return f"Token {self.token}"
        body = to_json({"refresh": self.token}).encode()
        answer = self._get("/api/token/refresh", {"Content-Type": "application/json"}, 65536, body)
        try:
            return f"Bearer {json.loads(answer)['access']}"
        except (ValueError, KeyError, TypeError):
            raise RequestError(503, "Label Studio does not take the token") from None

    def _get(self, path: str, headers: dict[str, str], max_bytes: int, body: bytes | None = None) -> bytes:
        request = Request(self.url.rstrip("/") + path, body, headers)
        try:
            with _OPENER.open(request, timeout=SECONDS) as answer:
                content = answer.read(max_bytes + 1)
        except HTTPError as error:
            raise RequestError(422, f"Label Studio answers {error.code} when asked for the image") from None
        except (URLError, OSError, ValueError) as error:
            raise RequestError(503, f"Label Studio cannot be reached: {type(error).__name__}") from None
        if len(content) > max_bytes:
            raise RequestError(413, f"the image has more than {max_bytes} bytes")
        return content


class _NoRedirects(HTTPRedirectHandler):
    """Turns a redirect into an error: it may lead anywhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = build_opener(_NoRedirects)


def image_of(address: Any, source: Source | None, max_bytes: int) -> bytes:
    """Return the image of a task: a data: URI, or a file of the configured Label Studio; nothing else is ever fetched.

    Raises RequestError.
    """
    if not isinstance(address, str):
        raise RequestError(422, "the task has no image under the name in the configuration")
    if address[: len(DATA_URI)].lower() == DATA_URI:
        return from_base64(address)
    if source is None:
        raise RequestError(422, "the image is not a data: URI, and without --label-studio-url it cannot be fetched")
    return source.fetch(address, max_bytes)


# Prompts -------------------------------------------------------------------------------------------------------------


def prompts_of(controls: list[Control]) -> dict[str, tuple[str, ...]]:
    """Return each label once, with the prompts of the first control that has it."""
    return {label: prompts for control in reversed(controls) for label, prompts in control.labels.items()}


def typed_prompts(controls: list[Control], params: Mapping[str, Any]) -> dict[str, tuple[str, ...]] | None:
    """Return what was typed last into a text area over the image, as labels with their prompts; None if Label Studio
    does not ask for a person who is at work.

    "rabbit, hare" has two prompts. One that is a label, or a prompt of one, belongs to it; another to the only label of
    the configuration, or to none: it stands for itself, and its regions get no label. "Animal: rabbit, hare" says the
    label of both. Empty for anything else than text, such as a click.
    """
    context = params.get("context")
    if not isinstance(context, Mapping):
        return None
    known, seen = prompts_of(controls), set()
    names = {_plain(text): label for label, own in known.items() for text in (*own, label)}
    only = next(iter(known)) if len(known) == 1 else None
    typed: dict[str, tuple[str, ...]] = {}
    for text in _texts(context, controls[0].to):
        head, colon, tail = text.partition(":")
        label = names.get(_plain(head)) if colon else None
        for prompt in filter(None, map(str.strip, (text if label is None else tail).split(","))):
            own = label or names.get(_plain(prompt)) or only or prompt
            is_name = label is None and own in known and _plain(own) == _plain(prompt)
            for wanted in known[own] if is_name else (prompt,):
                if _plain(wanted) not in seen:
                    typed[own] = (*typed.get(own, ()), wanted)
                    seen.add(_plain(wanted))
    return typed


def _plain(text: str) -> str:
    """Return a text for comparisons: "A cat" is "cat"."""
    return without_article(text).casefold()


def _texts(context: Mapping[str, Any], to: str) -> Iterator[str]:
    """Yield the last text of each text area over the image of the tag `to`: earlier ones are sent again."""
    results = context.get("result")
    for result in results if isinstance(results, list) else ():
        if isinstance(result, Mapping) and result.get("type") == "textarea" and result.get("to_name") == to:
            value = result.get("value")
            texts = value.get("text") if isinstance(value, Mapping) else None
            yield from (text for text in (texts[-1:] if isinstance(texts, list) else [texts]) if isinstance(text, str))
