//! Examples whose answers are classes: how often the likeliest of them is the right one.

use super::Lesson;
use crate::train::batch::Example;
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Most classes: each costs a pass over the validation set.
const MOST: usize = 64;

/// Figures of a classification. Those of many classes are means weighted by how often each is right.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Share of right answers.
    pub accuracy: f64,
    /// Of what is called a class, the share that is of it.
    pub precision: f64,
    /// Of what is of a class, the share that is called so.
    pub recall: f64,
    /// Their harmonic mean.
    pub f1: f64,
    /// The classes.
    pub classes: Vec<String>,
    /// A row for each true class, a column for each that was given.
    pub confusion: Vec<Vec<u64>>,
}

/// The tokens of an answer.
type Answer = Vec<u32>;

/// An example's prompt (where its answer begins) and its answer: the counted tokens, which must be its end.
fn parts(example: &Example) -> Option<(usize, Answer)> {
    let first = example.targets.iter().position(Option::is_some)?;
    let answer: Option<Answer> = example.targets[first..].iter().copied().take_while(|t| t.is_some()).collect();
    let rest = example.targets[first..].iter().skip_while(|t| t.is_some());
    (rest.clone().all(Option::is_none)).then_some((first, answer?))
}

/// The example with another answer.
fn with_answer(example: &Example, first: usize, answer: &Answer) -> Example {
    let mut ids = example.ids[..=first].to_vec();
    ids.extend(&answer[..answer.len() - 1]);
    let targets = (0..first).map(|_| None).chain(answer.iter().map(|&t| Some(t))).collect();
    Example { ids, targets }
}

/// The classes of `examples`, in the order in which they come.
///
/// # Errors
/// When there are too many or too few, or an example's answer is not one piece.
pub fn classes<'a>(examples: impl Iterator<Item = &'a Example>) -> Result<Vec<Vec<u32>>> {
    let mut classes: Vec<Answer> = Vec::new();
    for example in examples {
        let found = parts(example);
        ensure!(found.is_some(), "classification needs one answer in each example; some have several turns that count");
        if let Some((_, answer)) = found.filter(|(_, answer)| !classes.contains(answer)) {
            classes.push(answer);
        }
        ensure!(
            classes.len() <= MOST,
            "there are more than {MOST} different answers: classification metrics need classes, leave them out"
        );
    }
    ensure!(classes.len() > 1, "there is one answer alone: classification metrics need at least two classes");
    Ok(classes)
}

/// Scores the likeliest of `classes` for each of `examples`. `names` are what a person calls them.
pub fn scores(
    lesson: &mut dyn Lesson,
    examples: &[Example],
    classes: &[Vec<u32>],
    names: Vec<String>,
    rows: usize,
) -> Result<Scores> {
    let mut confusion = vec![vec![0u64; classes.len()]; classes.len()];
    for example in examples {
        let Some((first, answer)) = parts(example) else { continue };
        let Some(right) = classes.iter().position(|c| *c == answer) else { continue };
        let tries: Vec<Example> = classes.iter().map(|c| with_answer(example, first, c)).collect();
        let mut sums = Vec::with_capacity(tries.len());
        for part in super::micro_batches(&tries, rows) {
            sums.extend(lesson.losses(&tries[part])?.into_iter().map(|l| l.sum));
        }
        let given = (0..sums.len()).min_by(|&a, &b| sums[a].total_cmp(&sums[b])).unwrap_or(0);
        confusion[right][given] += 1;
    }
    Ok(figures(names, confusion))
}

fn figures(classes: Vec<String>, confusion: Vec<Vec<u64>>) -> Scores {
    let total = confusion.iter().flatten().sum::<u64>().max(1) as f64;
    let share = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 / b as f64 };
    let (mut accuracy, mut precision, mut recall, mut f1) = (0.0, 0.0, 0.0, 0.0);
    for (i, row) in confusion.iter().enumerate() {
        let (right, of, called) = (row[i], row.iter().sum(), confusion.iter().map(|r| r[i]).sum());
        let (p, r) = (share(right, called), share(right, of));
        let weight = of as f64 / total;
        accuracy += right as f64 / total;
        precision += weight * p;
        recall += weight * r;
        f1 += weight * if p + r == 0.0 { 0.0 } else { 2.0 * p * r / (p + r) };
    }
    Scores { accuracy, precision, recall, f1, classes, confusion }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(prompt: &[u32], answer: &[u32]) -> Example {
        let ids = [prompt, answer].concat();
        let labels: Vec<_> = ids.iter().enumerate().map(|(i, &t)| (i >= prompt.len()).then_some(t)).collect();
        Example::from_labels(ids, &labels)
    }

    #[test]
    fn answers_are_exchanged() {
        let e = example(&[1, 2, 3], &[7, 8]);
        let (first, answer) = parts(&e).unwrap();
        assert_eq!((first, answer.as_slice()), (2, [7, 8].as_slice()));
        let other = with_answer(&e, first, &vec![9, 4, 5]);
        assert_eq!(other.ids, [1, 2, 3, 9, 4]);
        assert_eq!(other.targets, [None, None, Some(9), Some(4), Some(5)]);
        let all = [example(&[1], &[7]), example(&[2], &[8, 9]), example(&[3], &[7])];
        assert_eq!(classes(all.iter()).unwrap(), [vec![7], vec![8, 9]]);
        assert!(classes(all[..1].iter()).is_err());
        let many: Vec<_> = (0..100).map(|i| example(&[1], &[i])).collect();
        assert!(classes(many.iter()).unwrap_err().to_string().contains("64"));
    }

    #[test]
    fn the_figures_of_scikit_learn() {
        // precision_recall_fscore_support(..., average="weighted") of these pairs.
        let s = figures(vec!["a".into(), "b".into()], vec![vec![3, 1], vec![2, 4]]);
        assert!((s.accuracy - 0.7).abs() < 1e-12);
        assert!((s.precision - (0.4 * 0.6 + 0.6 * 0.8)).abs() < 1e-12);
        assert!((s.recall - (0.4 * 0.75 + 0.6 * 4.0 / 6.0)).abs() < 1e-12);
        assert!((s.f1 - (0.4 * (2.0 / 3.0) + 0.6 * (8.0 / 11.0))).abs() < 1e-12);
        assert_eq!(figures(vec!["a".into()], vec![vec![0]]).f1, 0.0);
    }
}
