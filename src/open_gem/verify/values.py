"""Published numbers of real checkpoints. Nobody of this project could run these checkpoints where it was built: the
numbers are copied from their sources."""

from open_gem.verify.checkers import (
    Boxes,
    Captioned,
    Concept,
    ExpertTokens,
    Framing,
    Masks,
    PromptedMasks,
    Published,
    Scores,
    Tokens,
    TrainedScores,
)
from open_gem.verify.images import (
    ASTRONAUT,
    BEACH,
    CAR,
    CAT,
    CATS,
    CATS_PNG,
    DIAGRAM,
    GROCERIES,
    LAPTOP,
    LARGE_CIRCLE,
    OWL,
    SMALL_CIRCLE,
    STREET,
    TRUCK,
)

_TESTS = "transformers: tests/models"
_PIPELINES = "transformers: tests/pipelines/test_pipelines_zero_shot_image_classification.py"
_TASKS = "transformers: docs/source/en/tasks/zero_shot_image_classification.md"
_CAT_OR_DOG = ("a photo of a cat", "a photo of a dog")
_DIAGRAM = ("a diagram", "a dog", "a cat")
_B32, _SIGLIP = "openai/clip-vit-base-patch32", "google/siglip-base-patch16-224"
_OPENAI = "timm/vit_base_patch32_clip_224.openai"
_CIRCLES = (
    "circle",
    "ellipsoid",
    "blue circle on red background",
    "blue circle with green border on red background",
    "green circle on red background",
    "a dog",
    "a blue dog with a green border on a red background",
)
_LOGITS = 0.02
"""Tolerance of logits around 20: 0.001 of them and 0.001, as in transformers' tests."""
_TOKENS = 1e-3
"""Tolerance of tokens and boxes. Sources have 1e-4, on their own machine and with their own resize; the numbers that
transformers publishes twice, for DINOv3, differ by 4e-4."""
_QUALITY = 2e-3
"""Tolerance of predicted IoUs. Sources have 1e-4, on their own machine."""
_ON_TRUCK = ((75, 275, 1725, 850), (425, 600, 700, 875), (1375, 550, 1650, 800), (1240, 675, 1400, 750))
_ON_GROCERIES = ((450, 170, 520, 350), (350, 190, 450, 350), (500, 170, 580, 350), (580, 170, 640, 350))
_SAM2, _EDGETAM = "facebook/sam2.1-hiera-tiny", "yonigozlan/EdgeTAM-hf"
_CAT_OR_DOG_LOGITS = "logits of 'a photo of a cat', 'a photo of a dog'"


def _photos(*names: str) -> tuple[str, ...]:
    """Fill the template of transformers' pipelines."""
    return tuple(f"This is a photo of {name}." for name in names)


VALUES: tuple[Published, ...] = (
    *(
        Scores(
            checkpoint=name,
            pretrained=pretrained,
            repository=repository,
            image=CATS,
            compared=_CAT_OR_DOG_LOGITS,
            expected=(24.5701, 19.3049),
            tolerance=_LOGITS,
            source=f"{_TESTS}/clip/test_modeling_clip.py",
            prompts=_CAT_OR_DOG,
        )
        for name, pretrained, repository in ((_B32, None, ""), ("ViT-B-32", "openai", _OPENAI))
    ),
    Scores(
        checkpoint=_B32,
        image=CATS_PNG,
        compared="probabilities of cat, plane, remote",
        expected=(0.485, 0.004, 0.511),
        tolerance=1e-3,
        source=_PIPELINES,
        prompts=_photos("cat", "plane", "remote"),
        output="softmax",
    ),
    Scores(
        checkpoint="ViT-B-32",
        pretrained="openai",
        repository=_OPENAI,
        image=DIAGRAM,
        compared="probabilities of 'a diagram', 'a dog', 'a cat'",
        expected=(0.9927937, 0.00421068, 0.00299572),
        tolerance=2e-3,  # computed in float16
        source="openai/CLIP: README.md",
        certainty="B",
        prompts=_DIAGRAM,
        output="softmax",
    ),
    Scores(
        checkpoint="openai/clip-vit-large-patch14",
        image=OWL,
        compared="probabilities of fox, bear, seagull, owl",
        expected=(7.3929e-5, 5.9607e-5, 1.9940e-4, 0.9996670),
        tolerance=5e-4,  # the image may be encoded again
        source=_TASKS,
        certainty="B",
        prompts=_photos("fox", "bear", "seagull", "owl"),
        output="softmax",
    ),
    Scores(
        checkpoint="openai/clip-vit-large-patch14",
        image=CAR,
        compared="probabilities of tree, car, bike, cat",
        expected=(3.3937e-4, 0.998572, 1.0570e-3, 3.1572e-5),
        tolerance=5e-4,  # the image may be encoded again
        source=_TASKS,
        certainty="B",
        prompts=("tree", "car", "bike", "cat"),
        output="softmax",
    ),
    *(
        Scores(
            checkpoint=name,
            pretrained=pretrained,
            repository=repository,
            image=CATS,
            compared="logits of 'a photo of 2 cats', 'a photo of 2 dogs'",
            expected=(-0.7567, -10.3354),
            tolerance=0.01,  # 0.001 of the second, and 0.001
            source=f"{_TESTS}/siglip/test_modeling_siglip.py",
            prompts=("a photo of 2 cats", "a photo of 2 dogs"),
            framing=Framing(224),
        )
        for name, pretrained, repository in (
            (_SIGLIP, None, ""),
            ("ViT-B-16-SigLIP", "webli", "timm/ViT-B-16-SigLIP"),
        )
    ),
    Scores(
        checkpoint=_SIGLIP,
        image=CATS_PNG,
        compared="probabilities of 2 cats, a plane, a remote",
        expected=(0.198, 0.0, 0.0),
        tolerance=1e-3,
        source=_PIPELINES,
        prompts=_photos("2 cats", "a plane", "a remote"),
        framing=Framing(224),
        output="sigmoid",
    ),
    *(
        Scores(
            checkpoint=f"google/siglip2-{size}-patch16-naflex",
            image=image,
            compared="logits of 'circle', 'ellipsoid' and five more",
            expected=expected,
            tolerance=_LOGITS,
            source=source,
            certainty=certainty,
            prompts=_CIRCLES,
            framing=Framing(256),  # 256 patches of 16 pixels
        )
        for size, image, expected, source, certainty in (
            (
                "base",
                SMALL_CIRCLE,
                (1.0195, -4.5395, 4.1757, 9.4264, 2.4409, -12.3230, 1.1520),
                f"{_TESTS}/siglip2/test_modeling_siglip2.py",
                "A",
            ),
            (
                "base",
                LARGE_CIRCLE,
                (-0.0280, -6.2269, 5.0358, 10.1879, 3.1058, -13.7355, 1.1687),
                f"{_TESTS}/siglip2/test_modeling_siglip2.py",
                "A",
            ),
            (
                "so400m",
                SMALL_CIRCLE,
                (0.9422, -7.3522, 5.7852, 9.9881, 5.3660, -12.7218, 0.6384),
                "transformers: src/transformers/models/siglip2/convert_siglip2_to_hf.py",
                "B",
            ),
        )
    ),
    Scores(
        checkpoint="facebook/metaclip-2-worldwide-huge-quickgelu",
        image=CATS,
        compared=_CAT_OR_DOG_LOGITS,
        expected=(19.9799, 13.6169),
        tolerance=_LOGITS,
        source=f"{_TESTS}/metaclip_2/test_modeling_metaclip_2.py",
        prompts=_CAT_OR_DOG,
    ),
    Scores(
        checkpoint="Salesforce/blip-itm-base-coco",
        image=BEACH,
        compared="cosine of 'A woman and her dog sitting in a beach'",
        expected=(0.5162,),  # 0.5053 before a correction in transformers
        tolerance=1e-3,
        source=f"{_TESTS}/blip/test_modeling_blip.py",
        prompts=("A woman and her dog sitting in a beach",),
        framing=Framing(384),
        output="cosine",
    ),
    Scores(
        checkpoint="EVA02-B-16",
        pretrained="merged2b_s8b_b131k",
        repository="timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k",
        image=DIAGRAM,
        compared="probabilities of 'a diagram', 'a dog', 'a cat'",
        expected=(0.8275, 0.1372, 0.0352),
        tolerance=0.02,  # computed in mixed precision
        source="baaivision/EVA: EVA-CLIP/README.md",
        certainty="B",
        prompts=_DIAGRAM,
        output="softmax",
    ),
    Scores(
        checkpoint="PE-Core-L-14-336",
        pretrained="meta",
        repository="timm/PE-Core-L-14-336",
        image=CAT,
        compared="probabilities of 'a diagram', 'a dog', 'a cat'",
        expected=(0.0, 0.0, 1.0),
        tolerance=0.01,  # rounded, mixed precision
        source="facebookresearch/perception_models: apps/pe/README.md",
        certainty="B",
        prompts=_DIAGRAM,
        framing=Framing(336),
        output="softmax",
    ),
    Scores(
        checkpoint="ViT-B-32",
        pretrained="laion2b_s34b_b79k",
        repository="laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        image=DIAGRAM,
        compared="probabilities of 'a diagram', 'a dog', 'a cat'",
        expected=(1.0, 0.0, 0.0),
        tolerance=0.01,
        source="mlfoundations/open_clip: README.md",
        certainty="C",
        prompts=_DIAGRAM,
        output="softmax",
    ),
    TrainedScores(
        checkpoint="nvidia/groupvit-gcc-yfcc",
        image=CATS,
        compared=_CAT_OR_DOG_LOGITS,
        expected=(13.3523, 6.3629),
        tolerance=_LOGITS,
        source=f"{_TESTS}/groupvit/test_modeling_groupvit.py",
        prompts=_CAT_OR_DOG,
    ),
    TrainedScores(
        checkpoint="nvidia/groupvit-gcc-redcaps",
        image=CATS,
        compared=_CAT_OR_DOG_LOGITS,
        expected=(16.1873, 8.6230),
        tolerance=_LOGITS,
        source="transformers: src/transformers/models/groupvit/convert_groupvit_nvlab_to_hf.py",
        certainty="B",
        prompts=_CAT_OR_DOG,
    ),
    Tokens(
        checkpoint=_B32,
        image=CATS_PNG,
        compared="tokens at 180×180, positions resampled",
        expected=(-0.1538, 0.0322, -0.3235, 0.2893, 0.1135, -0.5708, 0.0461, 0.1540, -0.6018),
        tolerance=_TOKENS,
        source=f"{_TESTS}/clip/test_modeling_clip.py",
        framing=Framing(180),
    ),
    ExpertTokens(
        checkpoint="facebook/dino-vits8",
        image=CATS_PNG,
        compared="tokens at 480×480, positions resampled",
        expected=(4.2325, 4.3882, -6.6678, 4.5372, 1.8933, -6.7355, 4.4454, 0.8514, -5.8747),
        tolerance=0.02,  # another interpolation of positions, in older versions of transformers, moves them by 0.016
        source=f"{_TESTS}/vit/test_modeling_vit.py",
        framing=Framing(480),
        resampling="bilinear",
    ),
    ExpertTokens(
        checkpoint="facebook/dinov2-base",
        image=CATS_PNG,
        compared="tokens",
        expected=(-2.1747, -0.4729, 1.0936, -3.2780, -0.8269, -0.9210, -2.9129, 1.1284, -0.7306),
        tolerance=0.02,  # as of DINO: published with older positions
        source=f"{_TESTS}/dinov2/test_modeling_dinov2.py",
        framing=Framing(224, 256),
    ),
    ExpertTokens(
        checkpoint="facebook/dinov2-with-registers-base",
        image=CATS_PNG,
        compared="class token and registers",
        expected=(-0.4638, -1.4563, -0.0289, -1.4736, -0.8866, 0.3005, 0.0720, -0.2406, -1.5943),
        tolerance=_TOKENS,
        source=f"{_TESTS}/dinov2_with_registers/test_modeling_dinov2_with_registers.py",
        framing=Framing(224, 256),
    ),
    ExpertTokens(
        checkpoint="facebook/dinov3-vits16-pretrain-lvd1689m",
        image=CATS_PNG,
        compared="class token and first patch",
        expected=(0.4637, -0.4160, 0.4086, -0.1265, -0.2865, -0.0386, -0.2509, -0.0161, -0.4556, 0.5716),
        tolerance=_TOKENS,
        source=f"{_TESTS}/dinov3_vit/test_modeling_dinov3_vit.py",
        framing=Framing(224),
        rows=(0, 5),
        columns=5,
        resampling="bilinear",
    ),
    Masks(
        checkpoint="CIDAS/clipseg-rd64-refined",
        image=CATS,
        compared="corner of the map of 'a cat', as logits",
        expected=(-7.4613, -7.4785, -7.3628, -7.3268, -7.0899, -7.1333, -6.9838, -6.7900, -6.8913),
        tolerance=5e-3,  # below 0.001 of them and 0.001
        source=f"{_TESTS}/clipseg/test_modeling_clipseg.py",
        prompts=("a cat", "a remote", "a blanket"),
    ),
    Boxes(
        checkpoint="google/owlvit-base-patch32",
        image=CATS,
        compared="boxes of the first patches",
        expected=(0.0691, 0.0445, 0.1373, 0.1592, 0.0456, 0.3192, 0.1632, 0.0423, 0.2478),
        tolerance=_TOKENS,
        source=f"{_TESTS}/owlvit/test_modeling_owlvit.py",
        prompts=_CAT_OR_DOG,
    ),
    *(
        Boxes(
            checkpoint="google/owlv2-base-patch16",
            image=CATS,
            compared=f"{output} of the first patches, image squashed by OWL-ViT's processor",
            expected=expected,
            tolerance=tolerance,
            source=f"{_TESTS}/owlv2/test_modeling_owlv2.py",
            prompts=_CAT_OR_DOG,
            output=output,
            squashed=True,
        )
        for output, expected, tolerance in (
            (
                "boxes",
                (0.241309, 0.051896, 0.453267, 0.139474, 0.045701, 0.250660, 0.233022, 0.050479, 0.427671),
                _TOKENS,
            ),
            ("logits", (-21.413497, -21.612638, -19.008193, -19.548841, -20.958896, -21.382694), _LOGITS),
        )
    ),
    *(
        Boxes(
            checkpoint="google/owlv2-base-patch16-ensemble",
            image=ASTRONAUT,
            compared=f"{output} of the first patches",
            expected=expected,
            tolerance=tolerance,
            source="transformers: src/transformers/models/owlv2/convert_owlv2_to_hf.py",
            certainty="B",
            prompts=("face", "rocket", "nasa badge", "star-spangled banner"),
            output=output,
        )
        for output, expected, tolerance in (
            ("boxes", (0.0126, 0.0090, 0.0238, 0.0387, 0.0227, 0.0754, 0.0582, 0.1058, 0.1139), _TOKENS),
            (
                "logits",
                (-8.6353, -9.5409, -6.6154, -7.9442, -9.6151, -6.7117, -12.4593, -15.3332, -12.1048),
                _LOGITS,
            ),
        )
    ),
    *(
        Captioned(
            checkpoint="IDEA-Research/grounding-dino-tiny",
            image=CATS_PNG,
            compared=f"{output} of the first three boxes for 'a cat.'",
            expected=expected,
            tolerance=tolerance,
            source=f"{_TESTS}/grounding_dino/test_modeling_grounding_dino.py",
            caption="a cat.",
            output=output,
        )
        for output, expected, tolerance in (
            ("boxes", (0.7674, 0.4136, 0.4572, 0.2566, 0.5463, 0.4760, 0.2585, 0.5442, 0.4641), _TOKENS),
            (
                "logits",
                (-4.8913, -0.1900, -0.2161, -4.9653, -0.3719, -0.3950, -5.9599, -3.3765, -3.3104),
                7e-3,  # 0.001 of the largest, and 0.001
            ),
        )
    ),
    *(
        Concept(
            checkpoint="facebook/sam3",
            image=LAPTOP,
            compared=f"{compared} for 'ear'",
            expected=expected,
            tolerance=tolerance,
            source=f"{_TESTS}/sam3/test_modeling_sam3.py",
            concept="ear",
            output=output,
        )
        for output, compared, expected, tolerance in (
            ("scores", "highest scores of instances", (0.9381, 0.9214, 0.0910), _QUALITY),
            (
                "mask",
                "corner of the best mask",
                (-2.1815, -6.2767, -7.0687, -5.7988, -10.2704, -10.9379, -8.5194, -10.7892, -9.9152),
                _LOGITS,
            ),
        )
    ),
    *(
        PromptedMasks(
            checkpoint="facebook/sam-vit-base",
            image=STREET,
            compared=f"predicted IoU of the last of three masks, {prompt}",
            expected=(expected,),
            tolerance=_QUALITY,
            source=f"{_TESTS}/sam/test_modeling_sam.py",
            points=points,
            boxes=boxes,
            several=True,
            output="last quality",
        )
        for prompt, points, boxes, expected in (
            ("point and box", ((820, 1080),), ((650, 900, 1000, 1250),), 0.9566),
            ("a point", ((400, 650),), (), 0.9675),
            ("two points", ((400, 650), (800, 650)), (), 0.9762),
            ("a box", (), ((75, 275, 1725, 850),), 0.7937),
        )
    ),
    *(
        PromptedMasks(
            checkpoint=checkpoint,
            image=TRUCK,
            compared=f"{compared}, a point",
            expected=expected,
            tolerance=tolerance,
            source=f"{_TESTS}/{tests}.py",
            points=((500, 375),),
            several=several,
            output=output,
        )
        for checkpoint, tests, compared, several, output, expected, tolerance in (
            (
                _SAM2,
                "sam2/test_modeling_sam2",
                "predicted IoUs of three masks",
                True,
                "quality",
                (0.9547, 0.4932, 0.0427),
                _QUALITY,
            ),
            (
                _SAM2,
                "sam2/test_modeling_sam2",
                "corner of the best of three masks",
                True,
                "mask",
                (-24.9288, -41.7466, -31.0128, -34.5113, -31.1054, -36.5913, -25.2597, -37.5912, -33.4030),
                0.05,  # 0.001 of the largest, and 0.001
            ),
            (_SAM2, "sam2/test_modeling_sam2", "predicted IoU", False, "quality", (0.9364,), _QUALITY),
            (
                _EDGETAM,
                "edgetam/test_modeling_edgetam",
                "predicted IoUs of three masks",
                True,
                "quality",
                (0.7621, 0.4859, 0.0461),
                _QUALITY,
            ),
        )
    ),
    *(
        PromptedMasks(
            checkpoint=checkpoint,
            image=image,
            compared="predicted IoUs, four boxes",
            expected=expected,
            tolerance=_QUALITY,
            source=f"{_TESTS}/{tests}.py",
            boxes=boxes,
        )
        for checkpoint, tests, image, boxes, expected in (
            (_SAM2, "sam2/test_modeling_sam2", TRUCK, _ON_TRUCK, (0.9904, 0.9689, 0.9770, 0.9079)),
            (_SAM2, "sam2/test_modeling_sam2", GROCERIES, _ON_GROCERIES, (0.9739, 0.9816, 0.9838, 0.9781)),
            (_EDGETAM, "edgetam/test_modeling_edgetam", TRUCK, _ON_TRUCK, (0.9773, 0.9415, 0.9683, 0.8792)),
            (_EDGETAM, "edgetam/test_modeling_edgetam", GROCERIES, _ON_GROCERIES, (0.9721, 0.9852, 0.9812, 0.9760)),
        )
    ),
)
