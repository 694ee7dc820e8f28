"""EveryDream 2's files and flags, and those of damian0815's fork: what each of their settings means here.

| module | reads |
|---|---|
| `run_file` | `train.json` and the flags: retired names, "off" as 0, clamped values, its order |
| `optimizer_file` | `optimizer.json` |
| `validation_file` | the validation config |
| `importing` | turns the side files that settings name into settings, and says who wins |

Not here: the prompt file, which is read again while a run trains (`training.prompt_file`), and null, which means "the
default" in its files (`settings`).
"""
