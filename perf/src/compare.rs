//! Comparison: this engine and others in turn, on the same work, in the same minutes.
//!
//! A file lists the comparisons; for each rival, ours and theirs run alternately, pair by pair, the
//! order within a pair changing. Every run says in which regime it was; a pair counts in a regime
//! when both its runs were in it, and mixed pairs stand apart. Printed are medians and their ratio,
//! so that one greater than 1 is in our favour.
//!
//! Called by `main`.

use crate::regime::Regime;
use crate::report::Failure;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Comparison with others.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// TOML file with the comparisons, such as perf/rivals.toml
    file: PathBuf,
    /// Folder that the commands of the file begin with as $RIVALS [default: the environment's]
    #[arg(long, value_name = "FOLDER")]
    rivals: Option<PathBuf>,
    /// Pairs of runs for each rival
    #[arg(long, default_value_t = 7, value_name = "N")]
    pairs: usize,
    /// Only comparisons and rivals whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Print every run as well
    #[arg(long)]
    verbose: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    comparison: Vec<Comparison>,
}

/// One figure of ours, and the rivals that have the same.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Comparison {
    name: String,
    /// Arguments of this program.
    ours: Vec<String>,
    /// The metric of our lines.
    metric: String,
    /// True where less is better.
    #[serde(default)]
    less_is_better: bool,
    rival: Vec<Rival>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rival {
    name: String,
    /// A command of the shell; $RIVALS is the folder that the user gave.
    command: String,
    /// Text that the output's line must contain.
    #[serde(default)]
    line: String,
    /// What stands before the figure in that line, such as `events_per_s=`.
    figure: String,
    /// What stands before the two round trips, `BEFORE/AFTER`.
    #[serde(default = "regime_key")]
    regime: String,
}

fn regime_key() -> String {
    "regime_rtt_ns=".into()
}

/// One run: the figure and the round trips.
type Run = (f64, [u64; 2]);

/// Runs all comparisons of the file.
pub fn run(args: &Args) -> Result<(), Failure> {
    let text = std::fs::read_to_string(&args.file)
        .map_err(|error| Failure::Usage(format!("cannot read {}: {error}", args.file.display())))?;
    let file: File = toml::from_str(&text).map_err(|error| {
        Failure::Usage(format!("{}: {}", args.file.display(), error.to_string().trim_end()))
    })?;
    let rivals = args.rivals.clone().or_else(|| std::env::var_os("RIVALS").map(PathBuf::from));
    if rivals.is_none() && text.contains("$RIVALS") {
        return Err(Failure::Usage(
            "the commands need --rivals FOLDER, or RIVALS in the environment".into(),
        ));
    }
    if args.pairs == 0 {
        return Err(Failure::Usage("--pairs 0: there is nothing to compare".into()));
    }
    let mut compared = 0;
    for comparison in &file.comparison {
        for rival in &comparison.rival {
            let name = format!("{} {}", comparison.name, rival.name);
            if args.only.as_ref().is_none_or(|only| name.contains(only)) {
                compare(args, comparison, rival, rivals.as_ref())?;
                compared += 1;
            }
        }
    }
    if compared == 0 {
        let only = args.only.as_deref().unwrap_or_default();
        return Err(Failure::Usage(format!(
            "--only {only}: nothing in the file has that in its name"
        )));
    }
    Ok(())
}

fn compare(
    args: &Args,
    comparison: &Comparison,
    rival: &Rival,
    folder: Option<&PathBuf>,
) -> Result<(), Failure> {
    let mut pairs: BTreeMap<Regime, Vec<(f64, f64)>> = BTreeMap::new();
    for pair in 0..args.pairs {
        let (ours, theirs) = if pair % 2 == 0 {
            let ours = run_ours(comparison)?;
            (ours, run_rival(rival, folder)?)
        } else {
            let theirs = run_rival(rival, folder)?;
            (run_ours(comparison)?, theirs)
        };
        let (own, other) = (Regime::of(ours.1), Regime::of(theirs.1));
        let regime = if own == other { own } else { Regime::Mixed };
        if args.verbose {
            println!("  {} {:?} {} {:?} {regime}", ours.0, ours.1, theirs.0, theirs.1);
        }
        pairs.entry(regime).or_default().push((ours.0, theirs.0));
    }
    for (regime, pairs) in pairs {
        let ours = median(pairs.iter().map(|pair| pair.0).collect());
        let theirs = median(pairs.iter().map(|pair| pair.1).collect());
        let less = comparison.less_is_better;
        let ratio = median(pairs.iter().map(|(a, b)| if less { b / a } else { a / b }).collect());
        println!(
            "{:<12} {:<24} {regime:<6} {:>2} pairs  testudo {:>14}  {:>14}  ratio {ratio:.2}",
            comparison.name,
            rival.name,
            pairs.len(),
            number(ours),
            number(theirs),
        );
    }
    Ok(())
}

fn number(value: f64) -> String {
    if value >= 1e6 { format!("{:.1} M", value / 1e6) } else { format!("{value:.2}") }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

fn run_ours(comparison: &Comparison) -> Result<Run, Failure> {
    let mut command = Command::new("/proc/self/exe");
    command.args(&comparison.ours).arg("--json");
    let text = output(&mut command, &format!("testudo-perf {}", comparison.ours.join(" ")))?;
    find_ours(&text, &comparison.metric).ok_or_else(|| {
        let metric = &comparison.metric;
        Failure::Run(format!("no figure {metric:?} with its regime in our own output:\n{text}"))
    })
}

/// The figure called `metric` in our own JSON lines.
fn find_ours(text: &str, metric: &str) -> Option<Run> {
    let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let line = lines.find(|line| line["metric"] == metric)?;
    let trip = |index: usize| line["regime_rtt_ns"][index].as_u64();
    Some((line["value"].as_f64()?, [trip(0)?, trip(1)?]))
}

fn run_rival(rival: &Rival, folder: Option<&PathBuf>) -> Result<Run, Failure> {
    let mut command = Command::new("sh");
    command.args(["-c", &rival.command]);
    if let Some(folder) = folder {
        // Commands may change their directory.
        command.env("RIVALS", std::fs::canonicalize(folder).unwrap_or_else(|_| folder.clone()));
    }
    let text = output(&mut command, &rival.command)?;
    find_rival(&text, rival).ok_or_else(|| {
        Failure::Run(format!(
            "no line with {:?}, {:?} and {:?} in the output of {}:\n{text}",
            rival.line, rival.figure, rival.regime, rival.command
        ))
    })
}

/// The figure in a rival's output.
fn find_rival(text: &str, rival: &Rival) -> Option<Run> {
    let mut lines = text.lines().filter(|line| line.contains(&rival.line));
    let line = lines.find(|line| line.contains(&rival.figure))?;
    let after = |key: &str| {
        line.split_once(key).map(|(_, rest)| rest.split_whitespace().next().unwrap_or(""))
    };
    let figure = after(&rival.figure)?.parse().ok()?;
    let (before, behind) = after(&rival.regime)?.split_once('/')?;
    Some((figure, [before.parse().ok()?, behind.parse().ok()?]))
}

fn output(command: &mut Command, name: &str) -> Result<String, Failure> {
    let done = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::Run(format!("cannot run {name}: {error}")))?;
    if !done.status.success() {
        return Err(Failure::Run(format!("{name} ended with {}", done.status)));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rival() -> Rival {
        Rival {
            name: "other".into(),
            command: String::new(),
            line: "bytes=64 ".into(),
            figure: "msgs_per_s=".into(),
            regime: regime_key(),
        }
    }

    #[test]
    fn a_figure_is_found_in_the_line_that_was_named() {
        let text = "x bytes=8 msgs_per_s=1 regime_rtt_ns=1/2\n\
                    x bytes=64 msgs_per_s=173.5 regime_rtt_ns=100/460 n=1";
        assert_eq!(find_rival(text, &rival()), Some((173.5, [100, 460])));
        assert_eq!(find_rival("bytes=64 msgs_per_s=x regime_rtt_ns=1/2", &rival()), None);
        assert_eq!(find_rival("bytes=64 msgs_per_s=1", &rival()), None);
    }

    #[test]
    fn our_own_lines_are_read_by_metric() {
        let text = r#"{"metric":"rows","value":5,"regime_rtt_ns":[1,2]}
{"metric":"events_per_s","value":7.5,"regime_rtt_ns":[90,95]}"#;
        assert_eq!(find_ours(text, "events_per_s"), Some((7.5, [90, 95])));
        assert_eq!(find_ours(text, "checksum"), None);
    }

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn the_list_of_rivals_is_sound() {
        let file: File =
            toml::from_str(include_str!("../rivals.toml")).expect("rivals.toml parses");
        for comparison in &file.comparison {
            assert!(!comparison.rival.is_empty(), "{} has no rival", comparison.name);
            for rival in &comparison.rival {
                assert!(rival.command.starts_with("$RIVALS/"), "{}: {}", rival.name, rival.command);
                assert!(rival.figure.ends_with('='), "{}: {}", rival.name, rival.figure);
            }
        }
    }
}
