use super::*;
use crate::engine::settings::Dry;
use proptest::prelude::*;

fn random_logits(n: usize, seed: u64, spread: f32) -> Vec<f32> {
    let mut r = Random::new(seed);
    // Sum of units: roughly a bell, as logits are.
    (0..n).map(|_| ((0..6).map(|_| r.unit()).sum::<f64>() as f32 - 3.0) * spread).collect()
}

/// Probabilities by id after temperature and truncations: sorted, summed and cut in f64, nothing clever.
fn reference(logits: &[f32], s: &Sampling) -> HashMap<u32, f64> {
    let t = f64::from(s.temperature);
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut all: Vec<(u32, f64)> =
        logits.iter().enumerate().map(|(i, &x)| (i as u32, (f64::from(x - max) / t).exp())).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let normalize = |all: &mut Vec<(u32, f64)>| {
        let sum: f64 = all.iter().map(|x| x.1).sum();
        all.iter_mut().for_each(|x| x.1 /= sum);
    };
    let cut = |all: &mut Vec<(u32, f64)>, p: f64| {
        let mut sum = 0.0;
        let keep = all.iter().position(|x| {
            sum += x.1;
            sum >= p
        });
        all.truncate(keep.map_or(all.len(), |k| k + 1));
    };
    if s.top_k > 0 {
        all.truncate(s.top_k);
    }
    normalize(&mut all);
    if s.top_p < 1.0 {
        cut(&mut all, f64::from(s.top_p));
        normalize(&mut all);
    }
    let top = all[0].1;
    all.retain(|x| x.1 >= f64::from(s.min_p) * top);
    normalize(&mut all);
    if s.typical_p < 1.0 {
        let entropy: f64 = all.iter().filter(|x| x.1 > 0.0).map(|x| -x.1 * x.1.ln()).sum();
        all.sort_by(|a, b| (-a.1.ln() - entropy).abs().total_cmp(&(-b.1.ln() - entropy).abs()));
        cut(&mut all, f64::from(s.typical_p));
        normalize(&mut all);
    }
    all.into_iter().collect()
}

fn probabilities(logits: &[f32], s: &Sampling) -> HashMap<u32, f64> {
    let mut sampler = Sampler::new(s.clone());
    let candidates = sampler.distribution(logits, None).unwrap().to_vec();
    let total = mass(&candidates);
    candidates.iter().map(|c| (c.id, f64::from(c.weight) / total)).collect()
}

#[test]
fn truncations_match_the_reference() {
    let settings = [
        Sampling::off(),
        Sampling::default(),
        Sampling { temperature: 0.3, ..Sampling::off() },
        Sampling { top_k: 7, ..Sampling::off() },
        Sampling { top_p: 0.9, ..Sampling::off() },
        Sampling { top_p: 0.999, temperature: 1.7, ..Sampling::off() },
        Sampling { min_p: 0.1, ..Sampling::off() },
        Sampling { typical_p: 0.8, ..Sampling::off() },
        Sampling { top_k: 50, top_p: 0.8, min_p: 0.02, typical_p: 0.9, temperature: 1.3, ..Sampling::off() },
    ];
    for (n, spread) in [(10, 1.0), (300, 3.0), (5000, 2.0), (5000, 0.01)] {
        for (i, s) in settings.iter().enumerate() {
            let logits = random_logits(n, i as u64, spread);
            let (got, want) = (probabilities(&logits, s), reference(&logits, s));
            // A candidate on the edge may fall either way by rounding; it must then be negligible.
            let differ = got.len().abs_diff(want.len());
            assert!(differ <= 1, "{s:?} on {n}: {} candidates, not {}", got.len(), want.len());
            for (id, p) in &want {
                let g = got.get(id).copied().unwrap_or(0.0);
                assert!((g - p).abs() < 1e-5 + p * 0.01, "{s:?} on {n}: token {id} has {g}, not {p}");
            }
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [1.0, 0.0, -1.0, 2.0, f32::NEG_INFINITY];
    let want = reference(&logits, &Sampling::off());
    let mut sampler = Sampler::new(Sampling { seed: Some(1), ..Sampling::off() });
    let mut counts = [0u32; 5];
    for _ in 0..100_000 {
        counts[sampler.sample(&logits, None).unwrap() as usize] += 1;
    }
    for (i, &count) in counts.iter().enumerate() {
        let p = want[&(i as u32)];
        assert!((f64::from(count) / 1e5 - p).abs() < 0.006, "token {i}: {count} of 100000 for {p}");
    }
    assert_eq!(counts[4], 0);
}

#[test]
fn the_seed_decides() {
    let logits = random_logits(1000, 3, 1.0);
    let draw = |seed| {
        let mut s = Sampler::new(Sampling { seed: Some(seed), ..Sampling::default() });
        (0..50).map(|_| s.sample(&logits, None).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draw(5), draw(5));
    assert_ne!(draw(5), draw(6));
    assert_ne!(Sampler::new(Sampling::off()).seed(), Sampler::new(Sampling::off()).seed());
}

#[test]
fn greedy_takes_the_first_of_the_greatest() {
    let mut s = Sampler::new(Sampling::greedy());
    assert_eq!(s.sample(&[0.0, 3.0, 1.0, 3.0], None).unwrap(), 1);
    let mut long = vec![-1.0; 1001];
    long[1000] = 0.5;
    assert_eq!(s.sample(&long, None).unwrap(), 1000);
    // A temperature close to zero does the same.
    let mut s = Sampler::new(Sampling { temperature: 1e-9, ..Sampling::off() });
    assert_eq!(s.sample(&[0.0, 3.0, 1.0, 2.9], None).unwrap(), 1);
}

#[test]
fn bad_logits_are_errors() {
    let mut s = Sampler::new(Sampling::default());
    for bad in [f32::NAN, f32::INFINITY] {
        let error = s.sample(&[0.0, bad, 1.0], None).unwrap_err().to_string();
        assert!(error.contains("not numbers"), "{error}");
    }
    assert!(s.sample(&[f32::NEG_INFINITY; 3], None).unwrap_err().to_string().contains("no token can follow"));
    assert!(s.sample(&[], None).is_err());
    assert!(s.sample(&[1.0, 2.0], Some(&[0])).is_err());
}

#[test]
fn masks_and_biases_apply() {
    let mut s = Sampler::new(Sampling { logit_bias: vec![(2, 10.0), (99, 1.0)], ..Sampling::greedy() });
    assert_eq!(s.sample(&[5.0, 4.0, 0.0, 1.0], None).unwrap(), 2);
    assert_eq!(s.sample(&[5.0, 4.0, 0.0, 1.0], Some(&[0b1010])).unwrap(), 1);
    // Tokens beyond the mask are not allowed.
    let logits: Vec<f32> = (0..100).map(|i| i as f32).collect();
    assert_eq!(s.sample(&logits, Some(&[u32::MAX, 1])).unwrap(), 32);
}

#[test]
fn penalties_are_as_defined() {
    let base = Sampling { repeat_penalty: 2.0, frequency_penalty: 0.5, presence_penalty: 0.25, ..Sampling::off() };
    let mut s = Sampler::new(Sampling { penalty_last_n: Some(3), ..base });
    s.accept(&[3, 0, 1, 1]);
    s.adjust(&[4.0, -4.0, 1.0, 2.0], None).unwrap();
    // 0 once: 4/2 - 0.5 - 0.25; 1 twice: -4*2 - 1 - 0.25; 3 is out of the window.
    assert_eq!(s.logits, [1.25, -9.25, 1.0, 2.0]);
}

#[test]
fn dry_penalizes_what_would_repeat() {
    let dry = Dry { multiplier: 1.0, base: 2.0, allowed_length: 2, ..Dry::default() };
    let mut s = Sampler::new(Sampling { dry, ..Sampling::off() });
    // ... 1 2 3 4 ... 1 2 3: a 4 would repeat three tokens: 2^(3-2). 9 follows a match of one only.
    s.accept(&[1, 2, 3, 4, 3, 9, 1, 2, 3]);
    s.adjust(&[0.0; 10], None).unwrap();
    assert_eq!(s.logits, [0.0, 0.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    // A breaker cuts the match: 2 breaks, so only the 3 matches, which is allowed.
    s.set_breakers([2].into());
    s.adjust(&[0.0; 10], None).unwrap();
    assert_eq!(s.logits, [0.0; 10]);
    // A long repetition stays finite.
    s.set_breakers(HashSet::new());
    s.accept(&[7; 5000]);
    s.adjust(&[0.0; 10], None).unwrap();
    assert!(s.logits[7] < -1e29 && s.logits[7].is_finite());
}

#[test]
fn dry_matches_a_plain_search() {
    let mut r = Random::new(11);
    for _ in 0..200 {
        let text: Vec<u32> = (0..60).map(|_| (r.bits() % 3) as u32).collect();
        let z = prefix_matches(&text);
        for i in 1..text.len() {
            let plain = text[i..].iter().zip(&text).take_while(|(a, b)| a == b).count();
            assert_eq!(z[i], plain);
        }
    }
}

#[test]
fn exp_is_close() {
    for i in 0..870_000 {
        let x = -(i as f32) / 10_000.0;
        let want = f64::from(x).exp();
        assert!((f64::from(exp_negative(x)) - want).abs() <= want * 3e-7, "e^{x}");
    }
    assert_eq!(exp_negative(0.0), 1.0);
    assert_eq!(exp_negative(f32::NEG_INFINITY), 0.0);
    assert_eq!(exp_negative(-1000.0), 0.0);
}

#[test]
fn published_settings_are_read() {
    let qwen = serde_json::json!({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1});
    let s = Sampling::from_generation_config(&qwen);
    assert_eq!((s.temperature, s.top_k, s.top_p, s.min_p, s.repeat_penalty), (0.6, 20, 0.8, 0.0, 1.1));
    assert_eq!(Sampling::from_generation_config(&serde_json::json!({"bos_token_id": 1})), Sampling::default());
    let odd = serde_json::json!({"temperature": "hot", "top_p": -3, "top_k": 1e300});
    assert!(Sampling::from_generation_config(&odd).check().is_ok());
    assert!(
        Sampling { top_p: 0.0, ..Sampling::off() }.check().unwrap_err().to_string().contains("top_p must be above 0")
    );
    assert!(Sampling { temperature: f32::NAN, ..Sampling::off() }.check().is_err());
}

proptest! {
    #[test]
    fn truncations_nest_and_sum_to_one(
        logits in prop::collection::vec(-20f32..20.0, 1..400),
        (tight, loose) in (0.01f32..1.0, 0.01f32..1.0).prop_map(|(a, b)| (a.min(b), a.max(b))),
        k in 1usize..50,
    ) {
        let pairs = [
            (Sampling { top_p: tight, ..Sampling::off() }, Sampling { top_p: loose, ..Sampling::off() }),
            (Sampling { min_p: loose, ..Sampling::off() }, Sampling { min_p: tight, ..Sampling::off() }),
            (Sampling { typical_p: tight, ..Sampling::off() }, Sampling { typical_p: loose, ..Sampling::off() }),
            (Sampling { top_k: k, ..Sampling::off() }, Sampling { top_k: k + 3, ..Sampling::off() }),
        ];
        for (inner, outer) in pairs {
            let (inner, outer) = (probabilities(&logits, &inner), probabilities(&logits, &outer));
            prop_assert!(!inner.is_empty());
            prop_assert!(inner.keys().all(|id| outer.contains_key(id)));
            for p in [&inner, &outer] {
                prop_assert!((p.values().sum::<f64>() - 1.0).abs() < 1e-9);
            }
        }
    }
}
