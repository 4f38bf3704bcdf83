"""What is asked: tasks from files of ours and of the public benchmarks, here or on the Hub.

Not here: how answers are graded (`scoring`), and in which arms problems are asked (`arms`).
"""

from vllm_rvec.evaluation.tasks.loading import check_task, chosen_problems, load_task
from vllm_rvec.evaluation.tasks.places import is_elsewhere
from vllm_rvec.evaluation.tasks.spec import FewShot, TaskSpec

__all__ = ["FewShot", "TaskSpec", "check_task", "chosen_problems", "is_elsewhere", "load_task"]
