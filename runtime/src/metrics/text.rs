//! The numbers in Prometheus' text form, version 0.0.4, under Flink's names where it has one.
//!
//! Invariants: each family has one HELP and one TYPE line, before its samples, which stand
//! together; labels are escaped; a counter's name says what is counted, a gauge's what is measured.
//!
//! Called by `serve`.

use super::figures::{EdgeFigures, ExternalState, Figures, OperatorFigures};
use std::fmt::Write;

/// What a label's value is.
type Labels<'a> = &'a [(&'a str, &'a str)];

struct Text {
    out: String,
    job: String,
}

/// A family's kind.
#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}

impl Text {
    fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        let _ = writeln!(self.out, "# HELP testudo_{name} {help}");
        let _ = writeln!(self.out, "# TYPE testudo_{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl std::fmt::Display) {
        let _ = write!(self.out, "testudo_{name}{{job=\"{}\"", escaped(&self.job));
        for (label, text) in labels {
            let _ = write!(self.out, ",{label}=\"{}\"", escaped(text));
        }
        let _ = writeln!(self.out, "}} {value}");
    }

    /// A family of one sample.
    fn one(&mut self, name: &str, kind: Kind, help: &str, value: impl std::fmt::Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }
}

/// As the text form wants it in a label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// All numbers.
pub(crate) fn text(figures: &Figures) -> String {
    let mut text = Text { out: String::new(), job: figures.job.clone() };
    job(&mut text, figures);
    workers(&mut text, figures);
    operators(&mut text, figures);
    edges(&mut text, figures);
    checkpoints(&mut text, figures);
    external(&mut text, figures);
    replicas(&mut text, figures);
    text.out
}

fn job(text: &mut Text, figures: &Figures) {
    let seconds = format!("{:.3}", figures.uptime_s);
    text.one("job_uptimeSeconds", Kind::Gauge, "Seconds since the job began.", seconds);
    let help = "Deaths of worker processes, each of which was replaced.";
    text.one("job_numRestarts", Kind::Counter, help, figures.restarts_total);
    let name = "job_numRestartsByCause";
    text.family(name, Kind::Counter, "The same by signal or exit code, once that is known.");
    for (cause, count) in &figures.restarts {
        text.sample(name, &[("cause", cause)], count);
    }
    let recovery = &figures.recovery;
    let help = "Recoveries that are over: a successor has attached.";
    text.one("job_numRecoveries", Kind::Counter, help, recovery.count);
    let help = "Time of all recoveries, from a death being seen to the successor having attached.";
    text.one("job_recoveryTimeSeconds", Kind::Counter, help, recovery.sum_us as f64 / 1e6);
    if let Some(last) = recovery.last_us {
        let help = "Time of the latest recovery.";
        text.one("job_lastRecoveryTimeSeconds", Kind::Gauge, help, last as f64 / 1e6);
    }
    let name = "job_userCounter";
    text.family(name, Kind::Counter, "Counters of the job's own.");
    for figure in &figures.counters {
        let worker = figure.worker.to_string();
        text.sample(name, &[("counter", &figure.name), ("worker", &worker)], figure.value);
    }
}

fn workers(text: &mut Text, figures: &Figures) {
    use super::figures::WorkerFigures as W;
    type Get = fn(&W) -> Option<String>;
    let number = |get: fn(&W) -> u64| move |worker: &W| Some(get(worker).to_string());
    let rate = |get: fn(&W) -> f64| move |worker: &W| Some(format!("{:.3}", get(worker)));
    macro_rules! each {
        ($($name:literal, $kind:ident, $help:literal, $get:expr;)*) => {
            $({
                text.family($name, Kind::$kind, $help);
                for worker in &figures.workers {
                    if let Some(value) = $get(worker) {
                        let label = worker.worker.to_string();
                        text.sample($name, &[("worker", &label)], value);
                    }
                }
            })*
        };
    }
    let watermark: Get = |worker| worker.watermark_ms.map(|ms| ms.to_string());
    each! {
        "worker_up", Gauge, "1 while a process of the worker runs and has attached.",
            |worker: &W| Some(u8::from(worker.state != "attaching" && worker.state != "failed"));
        "worker_lives", Counter, "Processes that were this worker.", number(|w| w.life);
        "worker_numCommits", Counter, "Steps that were committed.", number(|w| w.commits);
        "worker_busyTimeMsPerSecond", Gauge, "Milliseconds of a second spent on records.",
            rate(|w| w.busy_ms_per_s);
        "worker_idleTimeMsPerSecond", Gauge, "Milliseconds of a second without input.",
            rate(|w| w.idle_ms_per_s);
        "worker_backPressuredTimeMsPerSecond", Gauge,
            "Milliseconds of a second with input, and without room for what comes of it.",
            rate(|w| w.back_pressured_ms_per_s);
        "worker_waitingTimeMsPerSecond", Gauge,
            "Milliseconds of a second spent waiting for a system outside of the job.",
            rate(|w| w.waiting_ms_per_s);
        "worker_busyTimeMs", Counter, "The same since the job began.", number(|w| w.busy_ms);
        "worker_idleTimeMs", Counter, "The same since the job began.", number(|w| w.idle_ms);
        "worker_backPressuredTimeMs", Counter, "The same since the job began.",
            number(|w| w.back_pressured_ms);
        "worker_waitingTimeMs", Counter, "The same since the job began.", number(|w| w.waiting_ms);
        "worker_currentInputWatermark", Gauge,
            "Lowest watermark of the worker, milliseconds since 1970.", watermark;
        "worker_numRecordsIn", Counter, "Records that its sources have read.",
            number(|w| w.records_in);
        "worker_numRecordsOut", Counter, "Records that its sinks have taken.",
            number(|w| w.records_out);
        "worker_numRecordsInPerSecond", Gauge, "The same a second.", rate(|w| w.records_in_per_s);
        "worker_numRecordsOutPerSecond", Gauge, "The same a second.",
            rate(|w| w.records_out_per_s);
        "worker_numBytesIn", Counter, "Bytes taken from rings of other workers.",
            number(|w| w.bytes_in);
        "worker_numBytesOut", Counter, "Bytes put into rings to other workers.",
            number(|w| w.bytes_out);
        "worker_numBytesInPerSecond", Gauge, "The same a second.", rate(|w| w.bytes_in_per_s);
        "worker_numBytesOutPerSecond", Gauge, "The same a second.", rate(|w| w.bytes_out_per_s);
    }
}

/// What a count of an operator is called and means.
fn count_name(label: &str) -> (String, String) {
    let known = [
        ("records_in", "numRecordsIn", "Records that it has taken."),
        ("records_out", "numRecordsOut", "Records that it has given."),
        ("late", "numLateRecordsDropped", "Records that came after their windows had fired."),
        ("rejected", "numRecordsRejected", "Inputs and records that were refused."),
        ("dropped", "numRecordsDropped", "Records dropped because nobody could take them."),
    ];
    match known.iter().find(|(of, _, _)| *of == label) {
        Some((_, name, help)) => (format!("operator_{name}"), (*help).into()),
        // dead_lettered: numDeadLettered
        None => {
            let camel = label.split('_').map(|word| {
                let mut letters = word.chars();
                let first = letters.next().map(|letter| letter.to_ascii_uppercase());
                first.into_iter().chain(letters).collect::<String>()
            });
            (format!("operator_num{}", camel.collect::<String>()), format!("Counted as {label}."))
        }
    }
}

fn operators(text: &mut Text, figures: &Figures) {
    let labels: std::collections::BTreeSet<&String> =
        figures.operators.iter().flat_map(|operator| operator.counts.keys()).collect();
    for label in labels {
        let (name, help) = count_name(label);
        text.family(&name, Kind::Counter, &help);
        for operator in &figures.operators {
            let value = operator.counts.get(label).map(u64::to_string);
            operator_sample(text, &name, operator, value);
        }
        let name = format!("{name}PerSecond");
        text.family(&name, Kind::Gauge, "The same a second.");
        for operator in &figures.operators {
            let value = operator.per_s.get(label).map(|rate| format!("{rate:.3}"));
            operator_sample(text, &name, operator, value);
        }
    }
}

fn operator_sample(text: &mut Text, name: &str, of: &OperatorFigures, value: Option<String>) {
    let Some(value) = value else { return };
    let worker = of.worker.to_string();
    let labels: Labels<'_> =
        &[("operator", &of.operator), ("uid", &of.uid), ("kind", &of.kind), ("worker", &worker)];
    text.sample(name, labels, value);
}

fn edges(text: &mut Text, figures: &Figures) {
    type Get = fn(&EdgeFigures) -> String;
    let families: [(&str, Kind, &str, Get); 8] = [
        ("edge_numRecordsOut", Kind::Counter, "Records sent by this worker.", |edge| {
            edge.sent.to_string()
        }),
        ("edge_numRecordsIn", Kind::Counter, "Records taken by this worker.", |edge| {
            edge.taken.to_string()
        }),
        ("edge_numRecordsDropped", Kind::Counter, "Not sent: the consumer was dead.", |edge| {
            edge.dropped.to_string()
        }),
        ("edge_numDeadLettered", Kind::Counter, "Taken, and put aside.", |edge| {
            edge.dead_lettered.to_string()
        }),
        ("edge_numBytesOut", Kind::Counter, "Bytes put into its rings by this worker.", |edge| {
            edge.bytes_out.to_string()
        }),
        ("edge_numBytesIn", Kind::Counter, "Bytes taken from its rings by this worker.", |edge| {
            edge.bytes_in.to_string()
        }),
        ("edge_backlogBytes", Kind::Gauge, "Bytes that wait in rings to this worker.", |edge| {
            edge.backlog_bytes.to_string()
        }),
        ("edge_ringFill", Kind::Gauge, "The fullest ring to this worker, 0 to 1.", |edge| {
            format!("{:.4}", edge.fill)
        }),
    ];
    for (name, kind, help, get) in families {
        text.family(name, kind, help);
        for edge in &figures.edges {
            let worker = edge.worker.map_or("supervisor".into(), |worker| worker.to_string());
            text.sample(name, &[("edge", &edge.edge), ("worker", &worker)], get(edge));
        }
    }
}

fn checkpoints(text: &mut Text, figures: &Figures) {
    let Some(checkpoints) = &figures.checkpoints else { return };
    let number = "job_numberOfCompletedCheckpoints";
    text.one(number, Kind::Counter, "Checkpoints completed in this run.", checkpoints.completed);
    let number = "job_numberOfFailedCheckpoints";
    text.one(number, Kind::Counter, "Checkpoints failed in this run.", checkpoints.failed);
    if let Some(id) = checkpoints.last_id {
        let help = "Number of the latest complete checkpoint.";
        text.one("job_lastCheckpointId", Kind::Gauge, help, id);
        let millis = checkpoints.last_duration_us as f64 / 1e3;
        text.one("job_lastCheckpointDuration", Kind::Gauge, "How long it took, ms.", millis);
        let help = "Bytes that were written for it.";
        text.one("job_lastCheckpointSize", Kind::Gauge, help, checkpoints.last_bytes);
        let (help, bytes) = ("Bytes of it in flight.", checkpoints.last_in_flight_bytes);
        text.one("job_lastCheckpointInFlightBytes", Kind::Gauge, help, bytes);
    }
    let name = "job_regionCheckpointFailures";
    text.family(name, Kind::Counter, "Cuts of a region that failed.");
    for (region, failures) in checkpoints.failures_by_region.iter().enumerate() {
        text.sample(name, &[("region", &region.to_string())], failures);
    }
}

fn external(text: &mut Text, figures: &Figures) {
    let name = "external_state";
    text.family(name, Kind::Gauge, "Systems outside of the job: 0 ok, 1 failing, 2 waited for.");
    each_external(text, name, figures, |external| match external.state {
        ExternalState::Ok => 0,
        ExternalState::Failing => 1,
        ExternalState::Waiting => 2,
    });
    let name = "external_retries";
    text.family(name, Kind::Counter, "Tries that failed.");
    each_external(text, name, figures, |external| external.retries);
    let name = "external_sinceMs";
    text.family(name, Kind::Gauge, "Since when it is in its state, milliseconds since 1970.");
    each_external(text, name, figures, |external| external.since_ms);
}

fn replicas(text: &mut Text, figures: &Figures) {
    use super::figures::ReplicaFigures as R;
    if figures.replicas.is_empty() {
        return;
    }
    let mut each = |name: &str, kind, help: &str, get: fn(&R) -> u64| {
        text.family(name, kind, help);
        for replica in &figures.replicas {
            text.sample(name, &[("worker", &replica.worker.to_string())], get(replica));
        }
    };
    let help = "1 while a replica follows the worker.";
    each("replica_follows", Kind::Gauge, help, |r| u64::from(r.follows));
    each("replica_numSteps", Kind::Counter, "Steps that replicas have followed.", |r| r.steps);
    let help = "Comparisons of a replica with its worker.";
    each("replica_numChecks", Kind::Counter, help, |r| r.checks);
    let help = "Comparisons that found a difference.";
    each("replica_numMismatches", Kind::Counter, help, |r| r.mismatches);
    let help = "Replicas that could not keep up and were left behind.";
    each("replica_numLeftBehind", Kind::Counter, help, |r| r.left_behind);
    let help = "Bytes of the worker's journal that the replica has still to read.";
    each("replica_behindBytes", Kind::Gauge, help, |r| r.behind_bytes);
    let help = "Bytes of state of the latest copy.";
    each("replica_stateBytes", Kind::Gauge, help, |r| r.state_bytes);
}

fn each_external(
    text: &mut Text,
    name: &str,
    figures: &Figures,
    get: impl Fn(&super::figures::External) -> u64,
) {
    for external in &figures.external {
        let worker = external.worker.map_or("supervisor".into(), |worker| worker.to_string());
        text.sample(name, &[("name", &external.name), ("worker", &worker)], get(external));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let restarts = [("a \"b\"\n\\".to_owned(), 3)].into_iter().collect();
        let figures = Figures { job: "j\\".into(), restarts, ..Figures::default() };
        let text = text(&figures);
        let expected =
            "testudo_job_numRestartsByCause{job=\"j\\\\\",cause=\"a \\\"b\\\"\\n\\\\\"} 3\n";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn what_is_counted_has_a_name_of_its_own() {
        assert_eq!(count_name("late").0, "operator_numLateRecordsDropped");
        assert_eq!(count_name("dead_lettered").0, "operator_numDeadLettered");
    }
}
