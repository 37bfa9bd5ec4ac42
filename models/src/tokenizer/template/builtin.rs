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
    // Those of ChatGLM, Baichuan and InternLM do in their code what others do with a template.
    (
        "chatglm",
        "{% set ns = namespace(round=0) %}{% set rounds = messages | selectattr('role', 'equalto', 'user') | list | length %}\
         {% for m in messages %}{% if m['role'] == 'user' and rounds > 1 %}{{ '[Round ' ~ ns.round ~ ']\\n问：' + m['content'] + '\\n答：' }}{% set ns.round = ns.round + 1 %}\
         {% elif m['role'] == 'user' %}{{ m['content'] }}\
         {% elif m['role'] == 'assistant' and loop.last %}{{ '[gMASK]<sop>' + m['content'] }}{% else %}{{ m['content'] + '\\n' }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ '[gMASK]<sop>' }}{% endif %}",
    ),
    (
        "chatglm2",
        "{{ '[gMASK]sop' }}{% set ns = namespace(round=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.round = ns.round + 1 %}\
         {{ '[Round ' ~ ns.round ~ ']\\n\\n问：' + m['content'] + '\\n\\n答：' }}\
         {% elif m['role'] == 'assistant' and loop.last %}{{ m['content'] }}{% else %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}",
    ),
    (
        "chatglm3",
        "{{ '[gMASK]sop' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n ' + m['content'] }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ),
    (
        "baichuan",
        "{% for m in messages %}{{ {'user': '<reserved_102>', 'assistant': '<reserved_103>'}.get(m['role'], '') + m['content'] }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<reserved_103>' }}{% endif %}",
    ),
    (
        "baichuan2",
        "{% for m in messages %}{{ {'user': '<reserved_106>', 'assistant': '<reserved_107>'}.get(m['role'], '') + m['content'] }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}",
    ),
    (
        "internlm",
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|Bot|>:' + m['content'] + '<eoa>\\n' }}\
         {% else %}{{ {'system': '<|System|>:', 'user': '<|User|>:'}[m['role']] + m['content'] + '\\n' }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|Bot|>:' }}{% endif %}",
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
    // Baichuan's reserved pieces are many: those that are marks say which model it is.
    let listed = |piece: &str| tokenizer.marks().tokens().iter().any(|mark| mark.content == piece);
    let has = |piece: &str| if piece.starts_with("<reserved") { listed(piece) } else { tokenizer.id(piece).is_some() };
    let tests: [(&str, &[&str]); 12] = [
        ("chatml", &["<|im_start|>", "<|im_end|>"]),
        ("llama3", &["<|start_header_id|>", "<|eot_id|>"]),
        ("gemma", &["<start_of_turn>", "<end_of_turn>"]),
        ("chatglm3", &["[gMASK]", "sop", "<|assistant|>", "<|observation|>"]),
        ("chatglm2", &["[gMASK]", "sop", "eop"]),
        ("baichuan", &["<reserved_102>", "<reserved_103>"]),
        ("baichuan2", &["<reserved_106>", "<reserved_107>"]),
        ("internlm", &["<eoh>", "<eoa>"]),
        ("phi3", &["<|assistant|>", "<|end|>"]),
        ("zephyr", &["<|assistant|>", "<|user|>"]),
        ("mistral", &["[INST]", "[/INST]"]),
        ("chatglm", &["[gMASK]", "<sop>", "<eop>"]),
    ];
    tests.into_iter().find(|(_, marks)| marks.iter().all(|m| has(m))).map(|t| t.0)
}
