"""Contents of requests and answers, for checks and for the OpenAPI document."""

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from open_gem.localization import MIN_AREA, PRESENCE

SQUARE = (  # a red square of 16 pixels on white, 32 x 32
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgAQMAAABJtOi3AAAABlBMVEX////IHh7kMBY6AAAAF0lEQVR42mNgIBb8/8/AxMDAQCWCWAAA9BUC"
    "HTVYa/EAAAAASUVORK5CYII="
)
MOST_LISTED = 1000  # items of any list in a request, however high the limits of `Settings` are
LONGEST = 100_000  # characters of a labelling configuration

Two = Annotated[list[int], Field(min_length=2, max_length=2)]
Four = Annotated[list[int], Field(min_length=4, max_length=4)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_LISTED)]
Presence = Annotated[
    float | None, Field(description="Probability that the label is in the image; null for models that give none.")
]


class Strict(BaseModel):
    """A request's body: a misspelt name is an error, not ignored."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    error: str = Field(description="What is wrong, in one line.")


# Locating -------------------------------------------------------------------------------------------------------------


class Options(Strict):
    """How prompts are located, the same in every route."""

    method: str | None = Field(default=None, description="A name of /v1/models; null: its default.")
    methods: Texts | None = Field(
        default=None, description="Several of them, read from one pass of the model: `results` has an answer for each."
    )
    refine: str | None = Field(
        default=None, description="A refinement of /v1/models, or none: what boxes, masks and points are made of."
    )
    presence: Share = Field(
        default=PRESENCE, description="A label with a lower presence is absent, and has no objects."
    )
    absent: Literal["none", "presence", "denoise"] = Field(
        default="presence",
        description="Which labels are absent: those below `presence`; those that win no pixel clearly (denoise); none.",
    )
    threshold: Share = Field(default=0.5, description="A pixel is in the mask if its map is above.")
    heatmap_scale: Literal["minmax", "cosine", "probability"] | None = Field(
        default=None,
        description="Scale of the map: minmax, by label; cosine; or probability, a softmax over all prompts. null: "
        "probability with `negative`, minmax without.",
    )
    min_area: Share = Field(
        default=MIN_AREA, description="Smallest object, as a share of the image's pixels; smaller ones are left out."
    )
    instances: Literal["component", "label"] = Field(
        default="component", description="An object is a connected component of a label's mask, or all of it."
    )
    exclusive: bool = Field(
        default=False,
        description="Masks of different labels do not overlap: a pixel of several belongs to the label whose cosine is "
        "highest there.",
    )
    nms: Share | None = Field(
        default=None,
        description="Non-maximum suppression: of two objects, of any labels, whose boxes have an IoU above this, the "
        "less confident is dropped. null: none.",
    )
    negative: Texts | None = Field(
        default=None, description="Distractors: part of the softmax and of presence, never predicted."
    )
    mask: Literal["none", "rle", "png"] = Field(default="none", description="How objects have their masks.")
    similarity: bool = Field(default=False, description="With the cosine of every patch.")
    objects: bool = Field(default=True, description="With objects, which take time by the image's pixels.")

    @property
    def scale(self) -> str:
        """The scale of the maps that `threshold` applies to."""
        return self.heatmap_scale or ("probability" if self.negative else "minmax")

    @property
    def compares(self) -> bool:
        """Whether objects of one label depend on those of others."""
        return self.exclusive or self.nms is not None


class Like(Strict):
    """An exemplar in a prompt's place: what looks like a region of an uploaded image."""

    like: str = Field(description="The id of an uploaded image.", max_length=64)
    box: Four = Field(description="Left, top, right, bottom in pixels; right and bottom exclusive.")


TextsOrLike = Annotated[list[str | Like], Field(min_length=1, max_length=MOST_LISTED)]
LabelPrompts = Annotated[dict[str, TextsOrLike], Field(min_length=1, max_length=MOST_LISTED)]
Prompts = Annotated[
    Annotated[Texts, Tag("list")] | Annotated[LabelPrompts, Tag("object")],
    Discriminator(lambda value: "object" if isinstance(value, dict) else "list"),  # so that errors name one kind
]


class Ask(Options):
    prompts: Prompts = Field(
        description="Texts that are their own labels; or an object of labels with their prompts, texts and exemplars.",
        examples=[["a cat", "remote control"], {"cat": ["cat", {"like": "0123abcd", "box": [10, 20, 90, 80]}]}],
    )


class FormOptions(Options):
    prompts: Texts = Field(description="Texts that are their own labels, a field each.", examples=[["red square"]])


class ImageForm(Strict):
    file: UploadFile = Field(description="An image.")


class AskForm(FormOptions):
    file: UploadFile = Field(description="An image.")


class BatchForm(FormOptions):
    files: Annotated[list[UploadFile], Field(min_length=1, max_length=MOST_LISTED)] = Field(description="Images.")


class ImageInfo(BaseModel):
    id: str = Field(description="For later requests. The same bytes have the same id until the server restarts.")
    height: int = Field(description="Pixels of the image, upright as its EXIF orientation says.")
    width: int
    grid: Two | None = Field(description="Rows and columns of patches; null if the prompts decide.")
    model: str
    methods: list[str] = Field(description="Names for `method`.")
    warnings: list[str] = Field(description="What the model is not for.")


class Rle(BaseModel):
    size: Two = Field(description="Height and width.")
    counts: str = Field(description="COCO's compressed run lengths.")


class LocatedObject(BaseModel):
    label: str
    prompt: str = Field(description="The label's prompt that is most similar at the point.")
    score: float = Field(description="Highest cosine in the object; for models trained to localize, their own score.")
    confidence: float = Field(
        description="To rank objects of all labels and images: `presence`, times the highest value in the object of "
        "the label's map, scaled to [0, 1], times the label's softmax probability there; `score` for models without."
    )
    presence: Presence
    box: Four = Field(description="Left, top, right, bottom in pixels; right and bottom exclusive.")
    mask: Rle | str = Field(
        default="", description="COCO's run lengths, or base64 of a PNG of 0 and 255; if asked for."
    )
    point: Two | None = Field(description="x and y of the most confident pixel; null for predicted boxes.")
    mask_quality: float | None = Field(
        default=None, description="The IoU with the object that a segmenter (`--refine sam`) predicts for its mask."
    )


class LocatedLabel(BaseModel):
    label: str
    score: float | None = Field(description="Cosine of the label with the image as a whole, in [-1, 1].")
    presence: Presence
    present: bool = Field(description="Whether the label is in the image, by `absent` and `presence`.")
    similarity: str = Field(
        default="",
        description="If asked for: base64 of little-endian float16, rows × columns, the cosine of each patch with the "
        "most similar prompt.",
    )


class Located(BaseModel):
    """The labels and objects located in one image."""

    height: int
    width: int
    grid: Two
    model: str
    method: str
    warnings: list[str] = Field(description="What the model is not for.")
    labels: list[LocatedLabel] = Field(description="In the order of the prompts.")
    objects: list[LocatedObject] = Field(description="In the order of the labels, best first within each.")


class Compared(BaseModel):
    """The answers of several methods about one image."""

    results: list[Located] = Field(description="One per method, in the order of `methods`.")


class Batch(BaseModel):
    results: list[Located | Compared | Problem] = Field(
        description="One per image, in order; an error if it cannot be read."
    )


# Hugging Face ---------------------------------------------------------------------------------------------------------


class HuggingFaceParameters(Strict):
    candidate_labels: Texts = Field(examples=[["red square", "cat"]])
    threshold: Share = Field(default=PRESENCE, description="Objects with a lower score are left out.")


class HuggingFaceAsk(Strict):
    inputs: str = Field(description="Base64 of an image, or a data: URI. An address is not fetched.", examples=[SQUARE])
    parameters: HuggingFaceParameters
    options: dict[str, Any] | None = Field(default=None, description="Sent by Hugging Face's clients; has no effect.")


class Corners(BaseModel):
    xmin: int
    ymin: int
    xmax: int
    ymax: int


class HuggingFaceObject(BaseModel):
    label: str
    score: float = Field(description="The object's confidence.")
    box: Corners


# About ----------------------------------------------------------------------------------------------------------------


class MethodInfo(BaseModel):
    name: str
    about: str


class ModelInfo(BaseModel):
    name: str
    size: str = Field(description="How images are resized for it.")
    patch: Two | None = Field(description="Height and width of a patch in pixels; null if trained to localize.")
    dtype: str
    template: str | list[str] = Field(description="What a prompt is put into.")
    views: dict[str, Any] | None = Field(description="How an image is looked at; null if trained to localize.")
    default: str = Field(description="The method that null stands for.")
    methods: list[MethodInfo]
    refinements: list[str] = Field(description="Names for `refine`; null stands for the first.")
    limits: dict[str, Any]
    warnings: list[str] = Field(description="What the model is not for.")


class Models(BaseModel):
    models: list[ModelInfo]


class Sample(BaseModel):
    name: str
    labels: list[str]


class Samples(BaseModel):
    samples: list[Sample]


class Health(BaseModel):
    status: str
    model_class: str
    version: str


# Label Studio ---------------------------------------------------------------------------------------------------------


class Task(BaseModel):
    """A task of Label Studio; its other fields are ignored."""

    data: dict[str, Any] = Field(description="The image is under the name in the configuration.")
    id: Any = None


class Tasks(BaseModel):
    """A request of Label Studio for predictions."""

    tasks: list[Task] = Field(max_length=MOST_LISTED)
    label_config: str = Field(description="The project's labelling configuration.", max_length=LONGEST)
    params: dict[str, Any] | None = Field(default=None, description="With a `context`: what an annotator has typed.")


class Prediction(BaseModel):
    result: list[dict[str, Any]]
    score: float
    model_version: str
    error: str | None = None


class Predictions(BaseModel):
    results: list[Prediction]
    model_version: str


class Version(BaseModel):
    model_version: str


class Versions(BaseModel):
    versions: list[str]
