//! Accuracies and how sure they are.

use serde::Serialize;

/// What became of one question.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// The subject.
    pub subject: String,
    /// File and line of the question.
    pub place: String,
    /// The choice that is right, from 0.
    pub answer: usize,
    /// The likeliest choice.
    pub chosen: usize,
    /// The choice that is likeliest for its length in characters.
    pub chosen_by_length: usize,
    /// The natural logarithm of each choice's probability behind the question.
    pub log_likelihoods: Vec<f64>,
}

impl Answer {
    /// Chooses among choices with `log_likelihoods` and `lengths` in characters: the first of the greatest.
    pub fn new(subject: &str, place: &str, answer: usize, log_likelihoods: Vec<f64>, lengths: &[usize]) -> Answer {
        let first_greatest = |values: &mut dyn Iterator<Item = f64>| {
            let mut best = (0, f64::NEG_INFINITY);
            values.enumerate().for_each(|(i, value)| {
                if value > best.1 {
                    best = (i, value);
                }
            });
            best.0
        };
        let chosen = first_greatest(&mut log_likelihoods.iter().copied());
        let each = log_likelihoods.iter().zip(lengths).map(|(l, &n)| l / n.max(1) as f64);
        let chosen_by_length = first_greatest(&mut { each });
        let (subject, place) = (subject.to_owned(), place.to_owned());
        Answer { subject, place, answer, chosen, chosen_by_length, log_likelihoods }
    }
}

/// The answers to some questions, counted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Score {
    /// The subject, or `all`.
    pub subject: String,
    /// How many questions.
    pub questions: usize,
    /// The share that was answered rightly.
    pub accuracy: f64,
    /// Its standard error.
    pub stderr: f64,
    /// The share where the likeliest choice for its length is the right one, where choices are texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_norm: Option<f64>,
    /// Its standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr_norm: Option<f64>,
}

impl Score {
    /// Counts the answers of one subject.
    pub fn of(subject: &str, answers: &[Answer], texts: bool) -> Score {
        let share = |right: &dyn Fn(&Answer) -> bool| {
            let n = answers.len().max(1) as f64;
            let share = answers.iter().filter(|a| right(a)).count() as f64 / n;
            // The sample's standard deviation over the root of its size.
            (share, (share * (1.0 - share) / (n - 1.0).max(1.0)).sqrt())
        };
        let (accuracy, stderr) = share(&|a| a.chosen == a.answer);
        let norm = texts.then(|| share(&|a| a.chosen_by_length == a.answer));
        Score {
            subject: subject.to_owned(),
            questions: answers.len(),
            accuracy,
            stderr,
            accuracy_norm: norm.map(|n| n.0),
            stderr_norm: norm.map(|n| n.1),
        }
    }

    /// All subjects together, each question counting alike; errors are pooled over the subjects.
    pub fn all(scores: &[Score]) -> Score {
        let total: usize = scores.iter().map(|s| s.questions).sum();
        let n = total.max(1) as f64;
        let together = |of: &dyn Fn(&Score) -> (f64, f64)| {
            let mean = scores.iter().map(|s| of(s).0 * s.questions as f64).sum::<f64>() / n;
            let squares = |s: &Score| (s.questions as f64 - 1.0) * s.questions as f64 * of(s).1.powi(2);
            let pooled = scores.iter().map(squares).sum::<f64>() / (n - scores.len() as f64).max(1.0);
            (mean, (pooled / n).sqrt())
        };
        let (accuracy, stderr) = together(&|s| (s.accuracy, s.stderr));
        let texts = scores.iter().all(|s| s.accuracy_norm.is_some());
        let norm = texts.then(|| together(&|s| (s.accuracy_norm.unwrap_or(0.0), s.stderr_norm.unwrap_or(0.0))));
        Score {
            subject: "all".into(),
            questions: total,
            accuracy,
            stderr,
            accuracy_norm: norm.map(|n| n.0),
            stderr_norm: norm.map(|n| n.1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likeliest_and_likeliest_for_its_length() {
        let answer = Answer::new("s", "f, line 1", 1, vec![-3.0, -4.0, -3.0], &[3, 8, 3]);
        assert_eq!((answer.chosen, answer.chosen_by_length), (0, 1));
    }

    #[test]
    fn errors_are_those_of_samples() {
        let answers = |right: usize, n: usize| -> Vec<Answer> {
            let one = |i| Answer::new("s", "", usize::from(i >= right), vec![0.0, -1.0], &[1, 1]);
            (0..n).map(one).collect()
        };
        let a = Score::of("a", &answers(3, 4), false);
        // Of 1 1 1 0: variance 0.25, over 4.
        assert_eq!((a.accuracy, a.stderr, a.accuracy_norm), (0.75, 0.25, None));
        let b = Score::of("b", &answers(1, 6), true);
        let all = Score::all(&[a, b.clone()]);
        assert_eq!((all.questions, all.accuracy, all.accuracy_norm), (10, 0.4, None));
        // ((4 - 1) * 0.25^2 * 4 + (6 - 1) * (1 / 36) * 6) / 8 / 10
        assert!((all.stderr - ((0.75 + 5.0 / 6.0) / 80.0f64).sqrt()).abs() < 1e-12);
        assert!(
            (Score::all(std::slice::from_ref(&b)).stderr - b.stderr).abs() < 1e-12
                && b.accuracy_norm == Some(b.accuracy)
        );
        assert_eq!(Score::of("c", &answers(1, 1), false).stderr, 0.0);
    }
}
