//! `rushlight bench` as a person or a script runs it.

mod chat_model;

use std::process::{Command, Output};

fn bench(args: &[&str]) -> Output {
    let home = tempfile::tempdir().unwrap();
    chat_model::write(&home.path().join("models/tiny"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_rushlight"));
    command.args(["bench", "tiny", "-q"]).args(args).env("RUSHLIGHT_HOME", home.path()).output().unwrap()
}

#[test]
fn every_combination_is_measured_once_against_its_limit() {
    let output =
        bench(&["-p", "6", "-n", "3", "-r", "2", "--threads", "1,2", "--depth", "0,5", "--batch", "1,3", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.iter().map(|r| r["threads"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for run in runs {
        assert!(run["machine"]["read_bandwidth"].as_f64().unwrap() > 1e7);
        let rates = run["rates"].as_array().unwrap();
        let what: Vec<_> = rates
            .iter()
            .map(|r| (r["work"].as_str().unwrap(), r["depth"].as_u64().unwrap(), r["batch"].as_u64().unwrap()))
            .collect();
        let (p, g) = ("prompt", "generation");
        assert_eq!(what, [(p, 0, 1), (g, 0, 1), (g, 0, 3), (p, 5, 1), (g, 5, 1), (g, 5, 3)]);
        for rate in rates {
            let of = |name: &str| rate[name].as_f64().unwrap();
            assert!(of("slowest") > 0.0 && of("slowest") <= of("tokens_per_second"), "{rate}");
            assert!(of("tokens_per_second") <= of("fastest"), "{rate}");
            if rate["limit"] == "bandwidth" {
                assert!(of("share") > 0.0, "{rate}");
            }
        }
    }
}

#[test]
fn nothing_to_measure_is_said() {
    let output = bench(&["-p", "0", "-n", "0"]);
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("nothing to measure"));
}
