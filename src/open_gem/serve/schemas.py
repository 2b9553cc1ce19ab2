"""What requests and answers hold, for checks and for the OpenAPI document."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

SQUARE = (  # a red square of 16 pixels on white, 32 x 32
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgAQMAAABJtOi3AAAABlBMVEX////IHh7kMBY6AAAAF0lEQVR42mNgIBb8/8/AxMDAQCWCWAAA9BUC"
    "HTVYa/EAAAAASUVORK5CYII="
)
Two = Annotated[list[int], Field(min_length=2, max_length=2)]
Four = Annotated[list[int], Field(min_length=4, max_length=4)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
METHOD = "A name of /v1/models; null: its default."
PRESENCE = "Probability that the label is in the image at all; null for models that give none."
MOST_LISTED = 1000  # items of any list in a request, however high the limits of `Settings` are
LONGEST = 100_000  # characters of a labelling configuration


class Strict(BaseModel):
    """A request's body: a misspelt name is an error, not ignored."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    error: str = Field(description="What is wrong, in one line.")


class ImageInfo(BaseModel):
    id: str = Field(description="For later requests. The same bytes have the same id until the server restarts.")
    height: int = Field(description="Pixels of the image, upright as its EXIF orientation says.")
    width: int
    grid: Two | None = Field(description="Rows and columns of patches; null if the prompts decide.")
    model: str
    methods: list[str] = Field(description="Names for `method`.")


class Ask(Strict):
    prompts: list[str] = Field(
        description="Phrases.", min_length=1, max_length=MOST_LISTED, examples=[["a cat", "remote control"]]
    )
    method: str | None = Field(None, description=METHOD)
    threshold: Share | None = Field(
        None, description="A pixel is in the mask where its map, stretched to [0, 1], is above; null: 0.5."
    )
    mask: Literal["rle", "png", "none"] = "none"
    similarity: StrictBool = Field(False, description="With the cosine of every patch.")
    place: StrictBool = Field(True, description="With box and point, which take time by the image's pixels.")


class Rle(BaseModel):
    size: Two = Field(description="Height and width.")
    counts: str = Field(description="COCO's compressed run lengths.")


class Result(BaseModel):
    prompt: str
    score: float | None = Field(description="Cosine of the phrase with the image as a whole, in [-1, 1].")
    presence: float | None = Field(description="That score as the probability that it is in the image.")
    box: Four | None = Field(
        description="Left, top, right, bottom of the best connected part of the mask; right and bottom exclusive."
    )
    point: Two | None = Field(description="x and y of the most confident pixel.")
    mask: Rle | str | None = Field(description="COCO's run lengths, or base64 of a PNG of 0 and 255.")
    similarity: str | None = Field(
        description="Base64 of little-endian float16, rows × columns: the raw cosine of each patch, row by row."
    )


class Grounded(BaseModel):
    id: str
    height: int
    width: int
    grid: Two
    method: str
    model: str
    results: list[Result]


class Parameters(Strict):
    """Parameters of `/v1/ground`, with Hugging Face's names."""

    candidate_labels: list[str] = Field(min_length=1, max_length=MOST_LISTED, examples=[["red square", "cat"]])
    task: Literal["object-detection", "image-segmentation"] = "object-detection"
    threshold: Share = Field(0.5, description="Objects whose score is below are left out.")
    mask_threshold: Share = Field(
        0.5, description="A pixel is in the mask where its map, stretched to [0, 1], is above."
    )
    method: str | None = Field(None, description=METHOD)


class Inference(Strict):
    """Hugging Face's inference API."""

    inputs: str = Field(description="Base64 of an image, or a data: URI. An address is not fetched.", examples=[SQUARE])
    parameters: Parameters
    options: dict[str, Any] | None = Field(None, description="Sent by Hugging Face's clients; has no effect.")


class Corners(BaseModel):
    xmin: int
    ymin: int
    xmax: int
    ymax: int


class Detection(BaseModel):
    label: str
    score: float = Field(
        description="Confidence of this object, to rank objects: the label's presence times the highest value in the "
        "object of the label's map, stretched to [0, 1]; for models without presence, the highest cosine in it."
    )
    presence: float | None = Field(description=PRESENCE)
    box: Corners


class Segment(BaseModel):
    label: str
    score: float = Field(description="The label's presence; of models without presence, its cosine with the image.")
    presence: float | None = Field(description=PRESENCE)
    mask: str = Field(description="Base64 of a PNG of the image's size, 255 inside and 0 outside.")


class BatchItem(BaseModel):
    """The answer for one image of a batch, or why it could not be read."""

    found: list[Detection] | list[Segment] | None = None
    error: str | None = None


class Batch(BaseModel):
    results: list[BatchItem] = Field(description="One per image, in order.")


class MethodInfo(BaseModel):
    name: str
    about: str


class ModelInfo(BaseModel):
    name: str
    size: str = Field(description="How images are resized for it.")
    patch: Two | None = Field(description="Height and width of a patch in pixels; null if trained to localize.")
    dtype: str
    template: str | list[str] = Field(description="What a phrase is put into.")
    default: str = Field(description="The method that null stands for.")
    methods: list[MethodInfo]
    limits: dict[str, Any]


class Models(BaseModel):
    models: list[ModelInfo]


class Sample(BaseModel):
    name: str
    phrases: list[str]


class Samples(BaseModel):
    samples: list[Sample]


class Health(BaseModel):
    status: str
    model_class: str
    version: str


class Task(BaseModel):
    """A task of Label Studio; its other fields are ignored."""

    data: dict[str, Any] = Field(description="The image is under the name in the configuration.")
    id: Any = None


class Tasks(BaseModel):
    """A request of Label Studio for predictions."""

    tasks: list[Task] = Field(max_length=MOST_LISTED)
    label_config: str = Field(description="The project's labelling configuration.", max_length=LONGEST)


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
