"""OpenAI's fine-tuning guide as a program: only `base_url`, the key and the model are another's.

python walkthrough.py BASE_URL KEY MODEL FILE
"""

import sys
import time

from openai import OpenAI

base_url, key, model, path = sys.argv[1:]
client = OpenAI(base_url=base_url, api_key=key)

training_file = client.files.create(file=open(path, "rb"), purpose="fine-tune")  # noqa: SIM115, PTH123 - as in the guide

job = client.fine_tuning.jobs.create(
    training_file=training_file.id,
    model=model,
    suffix="walkthrough",
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    extra_body={"max_seq_length": 256, "training": {"max_steps": 2}, "exports": ["adapter", "gguf:q8_0"]},
)

while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(0.5)
    job = client.fine_tuning.jobs.retrieve(job.id)

for event in client.fine_tuning.jobs.list_events(fine_tuning_job_id=job.id, limit=10):
    print(event.message)
print(job.status, job.trained_tokens, job.error)

print(client.files.content(job.result_files[0]).text)

completion = client.chat.completions.create(
    model=job.fine_tuned_model,
    messages=[{"role": "user", "content": "Hello!"}],
    max_tokens=4,
)
print("answered with", completion.usage.completion_tokens, "tokens:", completion.choices[0].message)
