"""One process that has a teacher answer. `python -m understudy.training.teacher_answers_worker DIR`."""

from __future__ import annotations

from understudy.training.answer_parts import AnswerFile, AnswerParts
from understudy.training.answerers import Answerer, ModelAnswerer
from understudy.training.teacher_answers import AnswersJob, key_of
from understudy.training.teacher_processes import Pace, TeacherProcess, teacher_process

__all__ = ["main"]


def main() -> None:
    """Entry point of the processes that `generate_answers` starts."""
    with teacher_process() as process:
        _answer(process)


def _answer(process: TeacherProcess) -> None:
    """Adds the answers to this process's batches, each as a whole. A request to stop is obeyed at once, but never
    inside of a write."""
    environment = process.environment
    with process.requests.interruptible():
        job, left = AnswersJob.read(process.directory, environment.rank, environment.world_size)
        answerer: Answerer = ModelAnswerer(job.model, environment.local_rank, job.sampling, job.seed, job.batch_tokens)
    file = AnswerFile(AnswerParts(job.output), environment.rank)
    pace = Pace(process, "answers", sum(map(len, left)))
    for batch in left:
        with process.requests.interruptible():
            answered = {key_of(batch[i]): answer for i, answer in answerer.answers(batch)}
        file.add(answered)
        pace.advance(len(answered), sum(answer.tokens for answer in answered.values()))
    file.close()


if __name__ == "__main__":
    main()
