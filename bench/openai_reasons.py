"""Why fields and routes of OpenAI's API are different here, or absent."""

from __future__ import annotations

# Fields of a request that change nothing.
LABELS = (
    "Chat.metadata",
    "Chat.prediction",
    "Chat.prompt_cache_key",
    "Chat.prompt_cache_options",
    "Chat.prompt_cache_retention",
    "Chat.safety_identifier",
    "Chat.service_tier",
    "Chat.user",
)
# Fields of a request that are refused, unless they say nothing.
REFUSED = (
    "Chat.audio",
    "Chat.logit_bias",
    "Chat.logprobs",
    "Chat.moderation",
    "Chat.reasoning_effort",
    "Chat.store",
    "Chat.top_logprobs",
    "Chat.verbosity",
    "Chat.web_search_options",
    "Text.echo",
    "Text.suffix",
)
# Fields that are there and mean something else, or more, than OpenAI's.
DIFFERENT = {
    "FineTuningJob.status": "pausing and paused too, which the client's type does not name",
    "FineTuningJob.hyperparameters": "auto is resolved when the job is accepted",
    "FineTuningJob.organization_id": "the owner: the name of the key",
    "FineTuningJob.result_files": "the CSV as it is, where OpenAI's was sometimes base64",
    "FineTuningJob.trained_tokens": "tokens that went through the model; nobody is billed",
    "FineTuningJob.training_file": "hub:OWNER/NAME for a data set of the hub",
    "FineTuningJob.integrations": "one of wandb; project (the worker's) where the job names none",
    "Metrics.full_valid_loss": "as valid_loss: every evaluation is of all held-out rows",
    "Metrics.full_valid_mean_token_accuracy": "as valid_mean_token_accuracy",
    "Model.created": "0 for a base model: nobody knows",
    "FileObject.purpose": "evals too, which the client's type does not name",
    "JobCreateParams.model": "base models of this server and of the hub",
    "JobCreateParams.training_file": "any of Tuneyard's formats; hub:OWNER/NAME too",
    "JobCreateParams.integrations": "one of wandb, with the owner's key or the worker's account",
    "JobCreateParams.method": "supervised; dpo and reinforcement are refused",
    "JobCreateParams.seed": "42 if it is not given, where OpenAI draws one",
    "FileCreateParams.expires_after": "no time of its own for batch files",
    "UploadCreateParams.mime_type": "kept, and not judged",
    "WebhookCreateParams.event_types": "the three of fine-tuning",
    "Chat.model": "a fine-tuned model, a checkpoint or a job's id; base models don't answer",
    "Chat.max_completion_tokens": "default: to the end of the context",
    "Chat.messages": "text; no pictures, sound or files",
    "Chat.tools": "functions; no custom tools",
    "Chat.tool_choice": "auto and none",
    "Chat.n": "1",
    "Chat.modalities": "text",
    "Chat.response_format": "text",
    "Chat.stop": "up to 4 texts, of 1 to 1000 characters",
    "Text.prompt": "one text; no tokens",
    "Text.best_of": "1: one answer is made",
} | dict.fromkeys(LABELS, "taken and ignored")
# Null where the client's type has no null, which is OpenAI's own way too.
NULL = dict.fromkeys(
    ("Completion.choices", "CompletionChoice.finish_reason"), "finish_reason is null up to the stream's end"
)
# What there is not, and why.
ABSENT = {
    "Method.dpo": "trained by supervision alone",
    "Method.reinforcement": "trained by supervision alone",
    "Model.shutdown_date": "no model is shut down",
    "Chat.function_call": "tool_choice is its newer name",
    "Chat.functions": "tools is its newer name",
    "ChatCompletion.metadata": "answers are not stored",
    "ChatCompletion.moderation": "answers are not judged",
    "ChatCompletionChunk.moderation": "answers are not judged",
    "ChatCompletionChunk.obfuscation": "chunks are not padded",
    "ChatCompletionMessage.audio": "answers are text",
    "ChoiceDelta.audio": "answers are text",
    "ChoiceDelta.function_call": "tool_calls is its newer name",
    "ChatCompletionMessage.function_call": "tool_calls is its newer name",
} | dict.fromkeys(REFUSED, "refused, unless it says nothing")
ROUTES_ABSENT = {
    "POST /fine_tuning/checkpoints/{id}/permissions": "an owner's models are its own",
    "POST /fine_tuning/alpha/graders/run": "graders are for reinforcement",
    "POST /fine_tuning/alpha/graders/validate": "graders are for reinforcement",
}
