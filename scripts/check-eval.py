#!/usr/bin/env python3
"""Compare `rushlight eval` with a scorer of its own on llama.cpp's tokens and logits.

Prompts are built and choices scored here from the definitions of lm-evaluation-harness's tasks; tokens and logits are the
peer's (benches/peer). Needs numpy.

    scripts/check-eval.py MODEL.gguf mmlu DIR/anatomy_test.csv --shots 2 --limit 20
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile

import numpy

ENGLISH = "The following are multiple choice questions (with answers) about {}.\n\n"
CEVAL = "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n"
CMMLU = "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n"


def lettered(question, choices, ask):
    lines = [question.strip()] + [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices)]
    return "\n".join(lines + [ask])


def read(kind, path):
    """Prompt, choices and answer of each question."""
    if kind == "hellaswag":
        for line in open(path, encoding="utf-8"):
            doc = json.loads(line)
            query = doc["activity_label"] + ": " + doc["ctx_a"] + " " + doc["ctx_b"].capitalize()
            yield tidy(query), [tidy(ending) for ending in doc["endings"]], int(doc["label"])
        return
    rows = list(csv.reader(open(path, encoding="utf-8", newline="")))
    if kind == "mmlu":
        rows = [[None, *row] for row in rows]
    else:
        rows = rows[1:]
    for row in rows:
        ask = "Answer:" if kind == "mmlu" else "答案："
        yield lettered(row[1], row[2:6], ask), list("ABCD"), "ABCD".index(row[6])


def tidy(text):
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def call(*command):
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]}: {done.stderr.decode()}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("kind", choices=["mmlu", "ceval", "cmmlu", "hellaswag"])
    parser.add_argument("file")
    parser.add_argument("--subject", default="", help="what the description calls the subject")
    parser.add_argument("--examples", help="the file of examples")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--rushlight", default="target/release/rushlight")
    parser.add_argument("--peer", default=os.environ.get("RUSHLIGHT_PEER", "benches/peer/target/release/rushlight-peer"))
    args = parser.parse_args()
    place = tempfile.TemporaryDirectory()
    text, lines = os.path.join(place.name, "text"), os.path.join(place.name, "lines")

    def tokens(string):
        with open(text, "w", encoding="utf-8", newline="") as out:
            out.write(string)
        return call(args.peer, "tokenize", args.model, "-f", text)["ids"]

    def logprobs(ids, last):
        """What the last token predicts, or each of them, by position."""
        ids = ",".join(map(str, ids))
        which = [] if last else ["--all"]
        found = {}
        for row in call(args.peer, "logits", args.model, "--ids", ids, "--threads", "2", *which)["positions"]:
            logits = numpy.array(row["logits"], dtype=numpy.float64)
            logits -= logits.max()
            found[row["position"]] = logits - numpy.log(numpy.exp(logits).sum())
        return found

    description = {"mmlu": ENGLISH, "ceval": CEVAL, "cmmlu": CMMLU, "hellaswag": ""}[args.kind].format(args.subject)
    shown = list(read(args.kind, args.examples))[: args.shots] if args.shots else []
    before = description + "".join(f"{prompt} {choices[answer]}\n\n" for prompt, choices, answer in shown)
    ours = [args.rushlight, "eval", args.model, "--task", args.file, "--shots", str(args.shots), "--limit", str(args.limit)]
    ours += ["--examples", args.examples] if args.shots else []
    summary = call(*ours, "--json", "--quiet", "-o", lines)
    answers = [json.loads(line) for line in open(lines)]
    right = [0, 0]
    differences, others = [], 0
    for (prompt, choices, answer), got in zip(read(args.kind, args.file), answers):
        context = before + prompt
        start = len(tokens(context))
        scores, known = [], {}
        for choice in choices:
            ids = tokens(f"{context} {choice}")
            # All letters are predicted by the same row.
            key = tuple(ids[:-1])
            if key not in known:
                known[key] = logprobs(key, start + 1 == len(ids))
            scores.append(sum(known[key][i - 1][ids[i]] for i in range(start, len(ids))))
        lengths = [len(choice) for choice in choices]
        best = int(numpy.argmax(scores)), int(numpy.argmax(numpy.array(scores) / lengths))
        right = [right[0] + (best[0] == answer), right[1] + (best[1] == answer)]
        differences += [abs(a - b) for a, b in zip(scores, got["log_likelihoods"])]
        others += best[0] != got["chosen"] or best[1] != got["chosen_by_length"]
        if answer != got["answer"]:
            sys.exit(f"{got['place']}: the right answer is read as {got['answer']}, not {answer}")
    count = len(answers)
    mine = [round(summary["accuracy"] * count), round(summary.get("accuracy_norm", summary["accuracy"]) * count)]
    print(f"{args.file}: {count} questions, right here {right[0]} (by length {right[1]}), rushlight {mine[0]} ({mine[1]}); "
          f"{others} choices differ; log-likelihoods differ by {max(differences):.4f} at most, {numpy.mean(differences):.4f} on average")
    if max(abs(a - b) for a, b in zip(right, mine)) > 1:
        sys.exit("more than one question apart")


if __name__ == "__main__":
    main()
