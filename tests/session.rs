//! Conversations: what the cache holds is used again, and a talk goes on past the context.

mod chat_model;

use rushlight::engine::answer::Finish;
use rushlight::engine::loaded::Loaded;
use rushlight::engine::session::{Ask, Event, Message, Reply, Session};
use rushlight::engine::settings::Sampling;
use rushlight::engine::speculate::Speculator;
use rushlight::engine::{Engine, Options};
use rushlight_models::tokenizer::Specials;
use std::sync::atomic::{AtomicBool, Ordering};

/// The tiny model's context in tokens, which are bytes.
const CONTEXT: usize = 256;

struct Talk {
    _dir: tempfile::TempDir,
    engine: Engine,
    session: Session,
    notes: Vec<String>,
    prompt: Vec<u32>,
}

impl Talk {
    fn new(context: Option<usize>) -> Talk {
        let dir = tempfile::tempdir().unwrap();
        chat_model::write(dir.path());
        let options = Options { threads: Some(1), context, slots: 1, ..Options::default() };
        let loaded = Loaded::open(dir.path(), &options).unwrap();
        let template = loaded.template(None).unwrap();
        let prompt = loaded.tokenizer.encode("Once upon a time", Specials::AsText).unwrap();
        let session = Session::new(loaded.tokenizer, Some(template), 0);
        Talk { _dir: dir, engine: loaded.engine, session, notes: Vec::new(), prompt }
    }

    fn ask(&mut self, text: &str, ask: &Ask) -> anyhow::Result<Reply> {
        self.session.messages().push(Message::new("user", text));
        let notes = &mut self.notes;
        self.session.reply(&mut self.engine, ask, &AtomicBool::new(false), &mut |event| {
            if let Event::Note(note) = event {
                notes.push(note.to_string());
            }
        })
    }
}

fn greedy(max_tokens: Option<usize>) -> Ask {
    // No end mark: the random model must not stop by chance.
    let sampling = Sampling { logit_bias: vec![(257, -1000.0)], ..Sampling::greedy() };
    Ask { sampling, max_tokens, ..Ask::default() }
}

#[test]
fn the_cache_is_used_again_and_changes_nothing() {
    let mut talk = Talk::new(None);
    talk.session.messages().push(Message::new("system", "Be brief."));
    let first = talk.ask("Hello", &greedy(Some(10))).unwrap();
    assert_eq!((first.reused, first.tokens, first.finish), (0, 10, Finish::Length));
    let second = talk.ask("Go on", &greedy(Some(10))).unwrap();
    // All of the first prompt, and what the text of the answer still says of its tokens.
    assert!(second.reused >= first.prompt_tokens, "{second:?}");
    assert!(second.reused < second.prompt_tokens);
    let messages = talk.session.messages().clone();
    assert_eq!(
        messages.iter().map(|m| m.role.as_str()).collect::<Vec<_>>(),
        ["system", "user", "assistant", "user", "assistant"]
    );
    // The same talk without a cache to use.
    let mut fresh = Talk::new(None);
    *fresh.session.messages() = messages[..3].to_vec();
    let again = fresh.ask("Go on", &greedy(Some(10))).unwrap();
    assert_eq!((again.text, again.reused), (second.text, 0));
    assert!(talk.notes.is_empty());
    // The same question once more finds all but the last token of it there.
    talk.session.messages().pop();
    let reply = talk.session.reply(&mut talk.engine, &greedy(Some(3)), &AtomicBool::new(false), &mut |_| {}).unwrap();
    assert_eq!(reply.reused, reply.prompt_tokens - 1);
}

#[test]
fn a_long_talk_goes_on_without_its_oldest_turns() {
    let mut talk = Talk::new(None);
    talk.session.messages().push(Message::new("system", "Sys."));
    let mut kept = 0;
    for turn in 0..12 {
        let reply = talk.ask(&format!("message number {turn}"), &greedy(Some(12))).unwrap();
        assert_eq!(reply.tokens, 12, "turn {turn}");
        assert!(talk.engine.len(0) <= CONTEXT);
        assert_eq!(talk.engine.len(0), talk.session.held());
        if !talk.notes.is_empty() {
            kept = kept.max(reply.reused);
        }
    }
    assert!(talk.notes.iter().all(|n| n.contains("oldest")) && talk.notes.len() > 1, "{:?}", talk.notes);
    let messages = talk.session.messages();
    assert_eq!((messages[0].role.as_str(), messages[1].role.as_str()), ("system", "user"));
    assert_eq!(messages[messages.len() - 2].content, "message number 11");
    // Nothing that was said is lost.
    let said = talk.session.transcript();
    assert_eq!((said.len(), said[0].content.as_str()), (25, "Sys."));
    assert!((0..12).all(|turn| said[1 + 2 * turn].content == format!("message number {turn}")));
    // What came after the dropped turns was moved, not read again.
    assert!(kept > 60, "{kept}");
}

#[test]
fn an_answer_may_outgrow_the_context_too() {
    let mut talk = Talk::new(None);
    talk.ask("first question", &greedy(Some(40))).unwrap();
    let reply = talk.ask("second question", &greedy(Some(200))).unwrap();
    assert!(talk.notes.iter().any(|n| n.contains("oldest 2 messages")), "{:?}", talk.notes);
    // The one turn that is left fills the context by itself.
    assert_eq!(talk.session.messages().len(), 2);
    assert!(reply.tokens > 150, "{reply:?}");
    let reply = talk.ask("third", &greedy(None)).unwrap();
    assert_eq!(reply.finish, Finish::Context);
    assert_eq!(talk.engine.len(0), CONTEXT);
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_with_numbers() {
    let mut talk = Talk::new(Some(64));
    let error = talk.ask(&"x".repeat(100), &greedy(None)).unwrap_err().to_string();
    assert!(error.contains("the context holds 64") && error.contains("--ctx"), "{error}");
    let long = talk.prompt.repeat(10);
    let event = &mut |_: Event| {};
    let none = AtomicBool::new(false);
    let error = talk.session.complete(&mut talk.engine, long, &greedy(None), &none, event).unwrap_err().to_string();
    assert!(error.contains("160 tokens"), "{error}");
    assert!(talk.session.complete(&mut talk.engine, Vec::new(), &greedy(None), &none, event).is_err());
}

#[test]
fn an_interrupted_answer_is_kept() {
    let mut talk = Talk::new(None);
    talk.session.messages().push(Message::new("user", "Hello"));
    let (stop, mut pieces) = (AtomicBool::new(false), 0);
    let mut shown = String::new();
    let reply = talk
        .session
        .reply(&mut talk.engine, &greedy(Some(100)), &stop, &mut |event| {
            if let Event::Text(text) = event {
                shown += text;
                pieces += 1;
                stop.store(pieces == 3, Ordering::Relaxed);
            }
        })
        .unwrap();
    assert_eq!(reply.finish, Finish::Interrupted);
    assert!(reply.tokens < 20, "{reply:?}");
    assert_eq!(shown, reply.text);
    assert_eq!(talk.session.messages().last().unwrap(), &Message::new("assistant", reply.text));
    // And the talk goes on.
    assert_eq!(talk.ask("Again", &greedy(Some(5))).unwrap().tokens, 5);
}

#[test]
fn stop_strings_are_not_shown() {
    let mut talk = Talk::new(None);
    let whole = talk.ask("Hello", &greedy(Some(30))).unwrap().text;
    let stop: String = whole.chars().skip(8).take(3).collect();
    let mut talk = Talk::new(None);
    let cut = talk.ask("Hello", &Ask { stop: vec![stop.clone()], ..greedy(Some(30)) }).unwrap();
    assert_eq!(cut.finish, Finish::StopString);
    assert_eq!(cut.text, whole[..whole.find(&stop).unwrap()]);
}

#[test]
fn guessing_ahead_changes_no_token() {
    let sampled = |seed| {
        let sampling =
            Sampling { seed: Some(seed), temperature: 0.8, logit_bias: vec![(257, -1000.0)], ..Sampling::default() };
        Ask { sampling, max_tokens: Some(60), ..Ask::default() }
    };
    // Short periods, as greedy answers of a random model have, let n-grams guess well; a copy of the model always.
    for ask in [greedy(Some(60)), sampled(1), sampled(2)] {
        let plain = Talk::new(None).ask("abcabcabcabcab", &ask).unwrap();
        for by in ["ngram", "model"] {
            let mut talk = Talk::new(None);
            let tokenizer = Loaded::open(talk._dir.path(), &Options::default()).unwrap().tokenizer;
            talk.session.speculate(match by {
                "ngram" => Speculator::ngram(5),
                _ => Speculator::model(talk._dir.path(), &tokenizer, &Options::default(), 5).unwrap(),
            });
            let reply = talk.ask("abcabcabcabcab", &ask).unwrap();
            assert_eq!((&reply.text, reply.tokens), (&plain.text, plain.tokens), "{by}");
            let said = talk.session.messages()[1].content.clone();
            assert_eq!(said, plain.text);
            assert!(reply.guesses.accepted <= reply.guesses.guessed);
            if by == "model" && ask.sampling.temperature == 0.0 {
                // The draft is the model itself: it is wrong where another phase of it rounds otherwise, if ever.
                assert!(reply.guesses.guessed == 0 || reply.guesses.accepted > 0, "{:?}", reply.guesses);
            }
            // The conversation goes on from a cache that holds the right tokens.
            let next = talk.ask("Go on", &ask).unwrap();
            let mut fresh = Talk::new(None);
            *fresh.session.messages() = talk.session.messages()[..2].to_vec();
            assert_eq!(fresh.ask("Go on", &ask).unwrap().text, next.text, "{by}");
        }
    }
}

#[test]
fn guesses_are_checked_with_the_bits_of_single_steps() {
    let mut one = Talk::new(None);
    let mut many = Talk::new(None);
    one.engine.prompt(0, &one.prompt, &mut |_| true).unwrap();
    many.engine.prompt(0, &many.prompt, &mut |_| true).unwrap();
    let ids = [5u32, 9, 70, 33, 2];
    let logits = many.engine.step_ahead(0, ids[0], &ids[1..]).unwrap();
    assert_eq!(logits.rows(), ids.len());
    for (row, id) in ids.iter().enumerate() {
        assert_eq!(one.engine.step(&[(0, *id)]).unwrap(), logits.row(row), "row {row}");
    }
    // At the end of the context only what fits is taken.
    let left = CONTEXT - many.engine.len(0);
    many.engine.prompt(0, &vec![1; left - 2], &mut |_| true).unwrap();
    assert_eq!(many.engine.step_ahead(0, 1, &[1, 1, 1, 1]).unwrap().rows(), 2);
    assert!(many.engine.step_ahead(0, 1, &[1]).is_err());
}

#[test]
fn half_a_character_is_not_shown_where_an_answer_is_cut_off() {
    let always = |token| Sampling { logit_bias: vec![(token, 1000.0)], ..Sampling::greedy() };
    let ask = |token, max_tokens| Ask { sampling: always(token), max_tokens: Some(max_tokens), ..Ask::default() };
    let mut talk = Talk::new(None);
    // The first of four bytes; what follows the first of two of them cannot be its character's second byte.
    assert_eq!(talk.ask("Hello", &ask(0xf0, 1)).unwrap().text, "");
    assert_eq!(talk.ask("Hello", &ask(0xf0, 2)).unwrap().text, "\u{fffd}");
    let error = talk.ask("Hello", &ask(100_000, 1)).unwrap_err().to_string();
    assert_eq!(error, "a logit bias is given for token 100000, but the model's tokens end with 319");
}
