"""One configuration a command in which no rule is broken."""

_MODELS = """
teacher: {model: teacher, dtype: float32}
student: {model: student, dtype: float32}
output_dir: run
"""

VALID = {
    "train": f"""{_MODELS}
data: {{path: rows.jsonl}}
num_steps: 10
prompts: {{max_prompt_tokens: 200}}
rollout: {{max_completion_tokens: 300}}
grpo: {{questions_per_step: 8, group_size: 4}}
""",
    "rlvr": """
student: {model: student, dtype: float32}
verifier: {kind: exact}
output_dir: run
data: {path: rows.jsonl}
num_steps: 10
prompts: {max_prompt_tokens: 200}
rollout: {max_completion_tokens: 300}
grpo: {questions_per_step: 8, group_size: 4}
""",
    "sft": """
model: {model: teacher}
data: {path: rows.jsonl}
output_dir: run
max_tokens: 512
""",
    "score": f"""{_MODELS}
input: rows.jsonl
output: scores.parquet
""",
    "collect": f"""{_MODELS}
data: rows.jsonl
num_explanations: 4
prompts: {{max_prompt_tokens: 200}}
rollout: {{max_completion_tokens: 300}}
""",
    "evaluate": """
model: {model: teacher}
data: questions.jsonl
kind: exact
output_dir: run
prompts: {max_prompt_tokens: 200}
sampling: {max_completion_tokens: 300}
""",
    "prepare": """
input: [rows.jsonl]
output_dir: shards
""",
}
