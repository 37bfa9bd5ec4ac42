//! Classification: telling that a dataset asks for one of a few classes, and measuring how well they are told apart.

use super::Dataset;
use crate::train::batch::Example;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Most classes.
const CLASSES: usize = 64;
/// Most tokens of a class, with the mark that ends the turn.
const TOKENS: usize = 16;

/// The classes of `data` as the tokens of their answers, the most frequent first, where it looks like classification:
/// each item a conversation with one short answer, and far fewer answers than items.
pub fn classes(data: &Dataset) -> Option<Vec<Vec<u32>>> {
    let mut counts: BTreeMap<&[u32], usize> = BTreeMap::new();
    for item in 0..data.len() {
        let (_, answer) = data.question(item)?;
        *counts.entry(answer).or_default() += 1;
        if answer.len() > TOKENS || counts.len() > CLASSES {
            return None;
        }
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|c| std::cmp::Reverse(c.1));
    (counts.len() > 1 && counts.len() * 4 <= data.len()).then(|| counts.iter().map(|c| c.0.to_vec()).collect())
}

/// `prompt` answered with `class`: the class of the lowest loss is the model's choice.
pub fn answered(prompt: &[u32], class: &[u32]) -> Example {
    let ids = [prompt, class].concat();
    let labels: Vec<_> = ids.iter().enumerate().map(|(k, &id)| (k >= prompt.len()).then_some(id)).collect();
    Example::from_labels(ids, &labels)
}

/// How often which class was taken for which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confusion {
    classes: Vec<String>,
    /// `[expected][predicted]`, with what is none of the classes last.
    counts: Vec<Vec<usize>>,
}

/// The measures of one class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassMetrics {
    /// Its name.
    pub class: String,
    /// How many examples are of it.
    pub support: usize,
    /// Of what was said to be of it, the share that is; 0 where nothing was said to be.
    pub precision: f64,
    /// Of what is of it, the share that was said to be; 0 where nothing is.
    pub recall: f64,
    /// The harmonic mean of the two.
    pub f1: f64,
}

/// All measures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// The share of examples that were told right.
    pub accuracy: f64,
    /// Means over the classes that occur or were predicted, each counting alike.
    pub precision: f64,
    /// See `precision`.
    pub recall: f64,
    /// See `precision`.
    pub f1: f64,
    /// Each class.
    pub classes: Vec<ClassMetrics>,
    /// `[expected][predicted]`; the last column is answers that are none of the classes.
    pub confusion: Vec<Vec<usize>>,
}

impl Confusion {
    /// From pairs of expected class and predicted class, as places in `classes`; a prediction of `None` is none of them.
    pub fn new(classes: &[String], pairs: impl IntoIterator<Item = (usize, Option<usize>)>) -> Confusion {
        let n = classes.len();
        let mut counts = vec![vec![0; n + 1]; n];
        for (expected, predicted) in pairs {
            counts[expected][predicted.map_or(n, |p| p.min(n))] += 1;
        }
        Confusion { classes: classes.to_vec(), counts }
    }

    /// From pairs of labels; the classes are the expected ones, in the order of their names.
    pub fn of_labels<'a>(pairs: &[(&'a str, &'a str)]) -> Confusion {
        let mut classes: Vec<&str> = pairs.iter().map(|p| p.0).collect();
        classes.sort_unstable();
        classes.dedup();
        let place = |label: &str| classes.binary_search(&label).ok();
        let names: Vec<String> = classes.iter().map(|c| c.to_string()).collect();
        Confusion::new(&names, pairs.iter().map(|(e, p)| (place(e).unwrap_or_default(), place(p))))
    }

    /// Accuracy, and precision, recall and F1 of each class and on average.
    pub fn metrics(&self) -> Metrics {
        let share = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let total: usize = self.counts.iter().flatten().sum();
        let right: usize = (0..self.classes.len()).map(|c| self.counts[c][c]).sum();
        let classes: Vec<ClassMetrics> = (0..self.classes.len())
            .map(|c| {
                let (hit, support) = (self.counts[c][c], self.counts[c].iter().sum());
                let predicted: usize = self.counts.iter().map(|row| row[c]).sum();
                let (precision, recall) = (share(hit, predicted), share(hit, support));
                let f1 = share(2 * hit, predicted + support);
                ClassMetrics { class: self.classes[c].clone(), support, precision, recall, f1 }
            })
            .collect();
        let seen = |c: usize| classes[c].support > 0 || self.counts.iter().any(|row| row[c] > 0);
        let counted: Vec<&ClassMetrics> = (0..classes.len()).filter(|&c| seen(c)).map(|c| &classes[c]).collect();
        let mean =
            |of: fn(&ClassMetrics) -> f64| counted.iter().map(|c| of(c)).sum::<f64>() / counted.len().max(1) as f64;
        Metrics {
            accuracy: share(right, total),
            precision: mean(|c| c.precision),
            recall: mean(|c| c.recall),
            f1: mean(|c| c.f1),
            confusion: self.counts.clone(),
            classes,
        }
    }
}

/// Measures and confusion table, for people.
impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |name: &str| name.trim().chars().take(16).collect::<String>();
        writeln!(f, "accuracy {:.4}", self.accuracy)?;
        writeln!(f, "{:16} {:>9} {:>9} {:>9} {:>7}", "class", "precision", "recall", "F1", "n")?;
        for c in &self.classes {
            let ClassMetrics { class, support, precision, recall, f1 } = c;
            writeln!(f, "{:16} {precision:>9.4} {recall:>9.4} {f1:>9.4} {support:>7}", short(class))?;
        }
        let (precision, recall, f1) = (self.precision, self.recall, self.f1);
        writeln!(f, "{:16} {precision:>9.4} {recall:>9.4} {f1:>9.4}", "mean")?;
        write!(f, "expected \\ said ")?;
        let names = self.classes.iter().map(|c| short(&c.class)).chain(["other".into()]);
        names.clone().try_for_each(|name| write!(f, " {name:>9}"))?;
        for (name, row) in names.zip(&self.confusion) {
            write!(f, "\n{name:16}")?;
            row.iter().zip(0..).try_for_each(|(n, column)| {
                let name = self.classes.get::<usize>(column).map_or(5, |c| short(&c.class).chars().count());
                write!(f, " {n:>width$}", width = name.max(9))
            })?;
        }
        writeln!(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_follow_their_definitions() {
        let pairs = [("a", "a"), ("a", "a"), ("a", "b"), ("b", "b"), ("b", "a"), ("b", "c"), ("c", "?")];
        let m = Confusion::of_labels(&pairs).metrics();
        assert_eq!(m.confusion, [[2, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(m.accuracy, 3.0 / 7.0);
        let of = |k: usize| (m.classes[k].precision, m.classes[k].recall, m.classes[k].f1, m.classes[k].support);
        assert_eq!(of(0), (2.0 / 3.0, 2.0 / 3.0, 4.0 / 6.0, 3));
        assert_eq!(of(1), (0.5, 1.0 / 3.0, 0.4, 3));
        assert_eq!(of(2), (0.0, 0.0, 0.0, 1));
        near(m.f1, (4.0 / 6.0 + 0.4) / 3.0);
        near(m.precision, (2.0 / 3.0 + 0.5) / 3.0);
        let told = m.to_string();
        assert!(told.contains("accuracy 0.4286") && told.contains("other") && told.lines().count() == 10, "{told}");
    }

    #[test]
    fn nothing_measured_is_nothing_wrong() {
        let m = Confusion::new(&["a".into(), "b".into()], []).metrics();
        assert_eq!((m.accuracy, m.f1), (0.0, 0.0));
        let m = Confusion::new(&["a".into(), "b".into()], [(0, Some(0))]).metrics();
        assert_eq!((m.accuracy, m.f1, m.classes[1].f1), (1.0, 1.0, 0.0));
    }

    #[test]
    fn an_answer_is_asked_for_behind_its_prompt() {
        let e = answered(&[1, 2], &[3, 4]);
        assert_eq!((e.ids, e.targets), (vec![1, 2, 3, 4], vec![None, Some(3), Some(4), None]));
    }
}
