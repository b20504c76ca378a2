"""Stand-ins for programs that a test machine may lack."""


def stand_in_nvidia_smi(home, busy):
    """Put an nvidia-smi first on the experiment's PATH whose GPUs are busy or not, as listed."""
    process = "<process_info><pid>1</pid></process_info>"
    utilization = "<gpu_util>0 %</gpu_util><memory_util>0 %</memory_util>"
    gpus = "".join(
        f"<gpu><processes>{process * is_busy}</processes>"
        f"<utilization>{utilization}</utilization></gpu>"
        for is_busy in busy
    )
    stand_in = home / "nvidia-smi"
    stand_in.write_text(f"#!/bin/sh\ncat <<END\n<nvidia_smi_log>{gpus}</nvidia_smi_log>\nEND\n")
    stand_in.chmod(0o755)
