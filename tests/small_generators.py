"""Small random pipelines of every architecture that is known, as their published ones are put together."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_models import SIDE, _make_vae, make_spelling_tokenizer

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ARCHITECTURES = ("sd15", "sd21", "sdxl", "sd_turbo")
TRANSFORMERS = ("sd3", "sd35", "flux_schnell", "flux_dev", "sana")
T5_LENGTH = 24  # tokens


def make_pipeline(architecture: str, *, safety_checker: bool = False) -> Any:
    """A random pipeline for pictures of `side_of` pixels and 8 x 8 latents, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if architecture in ("sd3", "sd35"):
            pipeline = _make_sd3(architecture)
        elif architecture.startswith("flux"):
            pipeline = _make_flux(architecture)
        elif architecture == "sana":
            pipeline = _make_sana()
        else:
            pipeline = _make_sdxl() if architecture == "sdxl" else _make_sd(architecture, safety_checker)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def side_of(architecture: str) -> int:
    """Pixels; Sana takes multiples of 32 only."""
    return 32 if architecture == "sana" else SIDE


def save_pipeline(architecture: str, folder: Path, **options: Any) -> Path:
    """The same as a folder in diffusers' layout."""
    make_pipeline(architecture, **options).save_pretrained(folder, safe_serialization=True)
    return folder


def save_lcm_lora(folder: Path, unet: Any, *, rank: int = 2, strength: float = 0.3) -> Path:
    """An adapter of a few-step model as LCM-LoRA is published: one safetensors file, kohya's names, with alphas."""
    rng = torch.Generator().manual_seed(3)
    tensors = {}
    for name, layer in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2")):
            rows, columns = layer.weight.shape[:2]
            tail = (1, 1) if isinstance(layer, torch.nn.Conv2d) else ()
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = strength * torch.randn(rank, columns, *tail, generator=rng)
            tensors[f"{key}.lora_up.weight"] = strength * torch.randn(rows, rank, *tail, generator=rng)
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


def _make_sd(architecture: str, safety_checker: bool) -> Any:
    import diffusers

    second = architecture != "sd15"  # SD-Turbo is SD 2.1's architecture
    tokenizer = make_spelling_tokenizer()
    scheduler = {
        "sd15": lambda: diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False),
        "sd21": lambda: diffusers.DDIMScheduler(
            **NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False
        ),
        "sd_turbo": lambda: diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing"),
    }[architecture]()
    return diffusers.StableDiffusionPipeline(
        vae=_make_vae(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        text_encoder=_make_text_encoder(tokenizer, activation="gelu" if second else "quick_gelu"),
        unet=_make_unet(use_linear_projection=second, attention_head_dim=(2, 4) if second else 2),
        safety_checker=_make_safety_checker() if safety_checker else None,
        feature_extractor=_make_feature_extractor() if safety_checker else None,
        requires_safety_checker=safety_checker,
    )


def _make_sdxl() -> Any:
    import diffusers

    tokenizer = make_spelling_tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=_make_vae(),
        tokenizer=tokenizer,
        tokenizer_2=make_spelling_tokenizer(),
        text_encoder=_make_text_encoder(tokenizer, activation="quick_gelu"),
        text_encoder_2=_make_text_encoder(tokenizer, activation="gelu", pooled=True),
        unet=_make_unet(
            use_linear_projection=True,
            attention_head_dim=(2, 4),
            cross_attention_dim=32,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )


def _make_sd3(architecture: str) -> Any:
    """Stable Diffusion 3; 3.5 (medium) has normalised queries and keys, and a second attention in its first block."""
    import diffusers

    newer: dict[str, Any] = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if architecture == "sd35" else {}
    tokenizer = make_spelling_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=_told_apart(
            diffusers.SD3Transformer2DModel(
                sample_size=SIDE // 2,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=32,
                caption_projection_dim=16,
                pooled_projection_dim=32,
                pos_embed_max_size=16,
                **newer,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_make_shifted_vae(),
        tokenizer=tokenizer,
        tokenizer_2=make_spelling_tokenizer(),
        tokenizer_3=make_t5_tokenizer(),
        text_encoder=_make_text_encoder(tokenizer, activation="quick_gelu", pooled=True),
        text_encoder_2=_make_text_encoder(tokenizer, activation="gelu", pooled=True),
        text_encoder_3=_make_t5(),
    )


def _make_flux(architecture: str) -> Any:
    """FLUX.1; dev takes the guidance as an input and shifts its noise levels by the number of tokens."""
    import diffusers

    dev = architecture == "flux_dev"
    tokenizer = make_spelling_tokenizer()
    return diffusers.FluxPipeline(
        transformer=_told_apart(
            diffusers.FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=16,
                guidance_embeds=dev,
                axes_dims_rope=(2, 2, 4),
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=_make_shifted_vae(),
        tokenizer=tokenizer,
        tokenizer_2=make_t5_tokenizer(),
        text_encoder=_make_text_encoder(tokenizer, activation="quick_gelu"),
        text_encoder_2=_make_t5(),
    )


def _make_sana() -> Any:
    """Sana; its scheduler is a DPM-Solver for flows, its autoencoder has no noise, and masks tell what is padding."""
    import diffusers
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", "\n")
    letters = (*special, *(chr(code) for code in range(33, 127)))
    gemma = Gemma2Config(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return diffusers.SanaPipeline(
        tokenizer=GemmaTokenizer(vocab={letter: number for number, letter in enumerate(letters)}),
        text_encoder=Gemma2Model(gemma),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.4,
        ),
        transformer=_told_apart(
            diffusers.SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=16,
                sample_size=8,
            )
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _told_apart(transformer: Any) -> Any:
    """The same with larger inputs of the text, so that prompts can be seen in the pictures."""
    for name, value in transformer.named_parameters():
        if name.startswith(("context_embedder.", "time_text_embed.text_embedder.", "caption_")):
            value.data *= 5
        if name.endswith("attn2.to_v.weight"):  # Sana's cross-attention
            value.data *= 20
        if name.startswith(("norm_out.", "proj_out.")):
            torch.nn.init.normal_(value, std=0.3)
    return transformer


def _make_shifted_vae() -> Any:
    """As that of Stable Diffusion 3 and FLUX: latents have an offset, and no convolution follows the encoder."""
    from diffusers import AutoencoderKL

    config = {name: value for name, value in _make_vae().config.items() if not name.startswith("_")}
    return AutoencoderKL(**config | {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False})


def make_t5_tokenizer() -> Any:
    """A T5 tokenizer that knows letters only."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(code) for code in range(33, 127))]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(n > 2)) for n, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
        ).save_pretrained(folder)
        return T5TokenizerFast.from_pretrained(folder, model_max_length=T5_LENGTH, extra_ids=0)


def _make_t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=97 + 1, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()  # it has dropout


def _make_unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": SIDE // 2,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    }
    unet = UNet2DConditionModel(**{**settings, **changes})
    for name, value in unet.named_parameters():
        if "attn2.to_v" in name or "add_embedding.linear_1" in name:
            value.data *= 20  # so that prompts can be seen in the pictures
    return unet


def _make_text_encoder(tokenizer: Any, *, activation: str, pooled: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=16,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def _make_safety_checker() -> Any:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    config = CLIPConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        projection_dim=8,
    )
    return StableDiffusionSafetyChecker(config)  # its thresholds are 1, which no cosine exceeds


def _make_feature_extractor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
