"""The trained student as a model folder that diffusers samples in a few steps."""

from collections.abc import Mapping

from slam_jax.weights import pretrained

# What the weights of a student may be written as; the first is what most programs expect.
DTYPES = ("float16", "bfloat16", "float32")

# What LCMScheduler knows and would take from a teacher's scheduler, and its defaults.
_LCM_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}


def student_scheduler_config(
    teacher_scheduler_config: Mapping, *, original_inference_steps: int = 50
) -> dict:
    """The scheduler_config.json of a student: what LCMScheduler.from_config(teacher's) gives.

    original_inference_steps: the number of start times that the student was trained on.
    One departure: x_0hat is never clipped or thresholded, whatever the teacher's file says, since
    the student was trained without; on latents LCMScheduler's clipping would spoil every image.
    """
    kept = {
        key: teacher_scheduler_config.get(key, default) for key, default in _LCM_DEFAULTS.items()
    }
    return {
        "_class_name": "LCMScheduler",
        **kept,
        "clip_sample": False,
        "thresholding": False,
        "original_inference_steps": original_inference_steps,
        # t * 10 in c_skip and c_out (METHOD.md §1.5).
        "timestep_scaling": 10.0,
    }


def student(
    teacher: pretrained.Pretrained,
    unet: pretrained.Component,
    *,
    original_inference_steps: int = 50,
) -> pretrained.Pretrained:
    """What to write for a trained student UNet: the rest of its teacher, and LCMScheduler."""
    scheduler = student_scheduler_config(
        teacher.scheduler, original_inference_steps=original_inference_steps
    )
    return teacher._replace(unet=unet, scheduler=scheduler)
