"""GroupViT (Xu et al. 2022), trained on images with captions."""

from functools import reduce

from PIL import Image
from torch import Tensor

from open_gem.images.pixels import size_of, target_size
from open_gem.numerics import check_finite_number
from open_gem.tensors import similarity
from open_gem.trained.base import Grounding, TrainedModel
from open_gem.types import Size


class GroupViT(TrainedModel):
    """Group tokens, between which patches are shared out softly, are compared with the prompts.

    A patch's similarity is the mean cosine of its groups, weighed by its shares: what the library's
    `segmentation_logits` are before they are upsampled (bilinear, so either order gives the same) and multiplied by the
    logit scale twice. Scores are cosines of the pooled embedding.

    The library's `forward` takes 224×224 pixels only. Here its embeddings interpolate positions, so that the model sees
    the whole image, at the size of GroupViT's own evaluation. Mean and deviation are the checkpoint's: the converted
    checkpoint has CLIP's, GroupViT's own code ImageNet's.
    """

    @property
    def size_rule(self) -> str:
        return "short:448"

    @property
    def logit_scale(self) -> float:
        return check_finite_number("logit scale", self, self.text.logit_scale)

    def _target(self, size: Size) -> Size:
        patch = self.model.config.vision_config.patch_size
        return target_size(self.size_rule, size, (patch, patch))

    def patches(self, size: Size) -> int:
        height, width = self._target(size)
        return height * width // self.model.config.vision_config.patch_size**2

    def prepare(self, image: Image.Image) -> Tensor:
        height, width = self._target(size_of(image))
        return self._pixels(image, size={"height": height, "width": width}, do_resize=True, do_center_crop=False)

    def _ground(self, pixels: Tensor, size: Size, text: Tensor) -> Grounding:
        vision, patch = self.model.vision_model, self.model.config.vision_config.patch_size
        encoded = vision.encoder(
            vision.embeddings(pixels, interpolate_pos_encoding=True), output_attentions=True, return_dict=True
        )
        groups = vision.layernorm(encoded.last_hidden_state)[0]
        # Patches to groups to groups of groups: (1, groups, patches) a stage -> the share of each group in each patch.
        shares = reduce(lambda patches, stage: stage @ patches, (stage.float() for stage in encoded.attentions))[0]
        cosines = similarity(self.model.visual_projection(groups), text)
        scores = similarity(self.model.visual_projection(groups.mean(0, keepdim=True)), text)[:, 0]
        rows = pixels.shape[-2] // patch
        return Grounding((cosines @ shares).unflatten(-1, (rows, -1)), scores)
