//! Templates for models that bring none, in the layouts their makers published.

use crate::tokenizer::Tokenizer;

const ALL: &[(&str, &str)] = &[
    (
        "chatml",
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    (
        "llama2",
        "{% set ns = namespace(system='') %}{% for m in messages %}\
         {% if m['role'] == 'system' %}{% set ns.system = '<<SYS>>\\n' + m['content'] + '\\n<</SYS>>\\n\\n' %}\
         {% elif m['role'] == 'user' %}{{ bos_token + '[INST] ' + ns.system + m['content'] | trim + ' [/INST]' }}{% set ns.system = '' %}\
         {% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
    (
        "llama3",
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
    (
        "mistral",
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}\
         {% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\\n\\n' %}\
         {% elif m['role'] == 'user' %}{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{% set ns.system = '' %}\
         {% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
    ),
    (
        "gemma",
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}\
         {% if m['role'] == 'system' %}{% set ns.system = m['content'] | trim + '\\n\\n' %}\
         {% else %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + ns.system + m['content'] | trim + '<end_of_turn>\\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ),
    (
        "phi3",
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    ),
    (
        "zephyr",
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    ),
    (
        "deepseek",
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\\n\\n' }}\
         {% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}\
         {% else %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    ),
    (
        "vicuna",
        "{{ bos_token }}{% if messages and messages[0]['role'] != 'system' %}{{ \"A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. \" }}{% endif %}\
         {% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}\
         {% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ),
    (
        "alpaca",
        "{{ bos_token }}{% if messages and messages[0]['role'] != 'system' %}{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' }}{% endif %}\
         {% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}\
         {% elif m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}{% else %}{{ '### Response:\\n' + m['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    ),
];

/// The names, in the order they are listed to people.
pub fn names() -> impl Iterator<Item = &'static str> {
    ALL.iter().map(|t| t.0)
}

/// The source of the template `name`.
pub fn source(name: &str) -> Option<&'static str> {
    ALL.iter().find(|t| t.0 == name).map(|t| t.1)
}

/// The template whose marks the vocabulary has.
pub fn guess(tokenizer: &Tokenizer) -> Option<&'static str> {
    let has = |piece: &str| tokenizer.id(piece).is_some();
    let tests: [(&str, &[&str]); 6] = [
        ("chatml", &["<|im_start|>", "<|im_end|>"]),
        ("llama3", &["<|start_header_id|>", "<|eot_id|>"]),
        ("gemma", &["<start_of_turn>", "<end_of_turn>"]),
        ("phi3", &["<|assistant|>", "<|end|>"]),
        ("zephyr", &["<|assistant|>", "<|user|>"]),
        ("mistral", &["[INST]", "[/INST]"]),
    ];
    tests.into_iter().find(|(_, marks)| marks.iter().all(|m| has(m))).map(|t| t.0)
}
