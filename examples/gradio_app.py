"""A Space of Hugging Face: this file as app.py, and requirements.txt with one line, `open_gem[gradio]`.

At home: pip install "open_gem[gradio]" && python examples/gradio_app.py
"""

import os

import gradio as gr
from PIL import Image

import open_gem
from open_gem.data.scenes import scene
from open_gem.errors import OpenGemError

localizer = open_gem.load(os.environ.get("OPEN_GEM_MODEL", "embedded"))
SAMPLES = [scene(seed, (384, 512)) for seed in range(4)]  # held-out scenes


def ground(image: Image.Image | None, phrases: str, method: str, threshold: float, presence: float):
    """The image with the masks of prompts that are present, and a table of all prompts."""
    if image is None:
        raise gr.Error("expected an image")
    image.thumbnail((1024, 1024))  # annotations are drawn at this size
    prompts = [phrase.strip() for phrase in phrases.split(",") if phrase.strip()]
    try:
        result = localizer.locate(localizer.encode(image, method), prompts)
    except OpenGemError as error:
        raise gr.Error(str(error)) from error
    shares = [1.0] * len(prompts) if result.presence is None else result.presence.tolist()
    scores, points = result.scores.tolist(), result.points().tolist()
    masks = result.masks(threshold)
    drawn = [(masks[at].cpu().numpy(), prompt) for at, prompt in enumerate(prompts) if shares[at] >= presence]
    rows = [
        [prompt, round(score, 3), round(share, 3), f"{x}, {y}"]
        for prompt, score, share, (x, y) in zip(prompts, scores, shares, points, strict=True)
    ]
    return (image, drawn), rows


demo = gr.Interface(
    ground,
    [
        gr.Image(type="pil", label="Image"),
        gr.Textbox("birthday cake, bee, a fire engine", label="Prompts, comma-separated"),
        gr.Dropdown(["gem", "clip", "maskclip", "clip_surgery"], value="gem", label="Method"),
        gr.Slider(0, 1, 0.5, label="Threshold: pixels whose map, stretched to [0, 1], is above"),
        gr.Slider(0, 1, 0.5, label="Presence: prompts less probable in the image are not drawn"),
    ],
    [gr.AnnotatedImage(label="Located"), gr.Dataframe(headers=["prompt", "score", "presence", "point"])],
    examples=[[Image.fromarray(made.image), ", ".join(made.names), "gem", 0.5, 0.5] for made in SAMPLES],
    cache_examples=False,
    title="open_gem: localization without training",
    api_name="ground",
)

if __name__ == "__main__":
    demo.launch()
