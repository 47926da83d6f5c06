"""The experiment node for the report: which models it compares, and what they are asked."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from trainer.errors import UserError
from trainer.experiment.node import Node, Positive


class Report(Node):
    """What `report.md` compares."""

    control: bool = True
    """Also train the same student on the same tokens without its teacher."""
    prompt: Annotated[str, Field(min_length=1)] = "The"
    """Prompt that every model continues as a sample; if the data are chats, a user's message that it answers."""
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """Several prompts, in the place of `prompt`."""
    sample_tokens: Positive = 64
    """Tokens generated at most for each sample."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Report:
        if self.prompts is not None and self.prompt != Report.model_fields["prompt"].default:
            raise UserError("prompt", "`prompt` is for one prompt, and `prompts` names several", value=self.prompt,
                            way_out="put it into `prompts` as well, and leave `prompt` out")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """All prompts."""
        return self.prompts or (self.prompt,)
