//! Settings: the same names on the command line and in a TOML file. Defaults < file < flags;
//! unknown keys are refused.
//!
//! Called by `cli` and by whoever embeds a job; the plan and all processes work from [`Settings`],
//! never from the environment.

use crate::checkpoint::schedule::{Schedule, parse_duration};
use crate::error::Error;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a waiting worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Idle {
    /// Never sleeps: for cores of one's own.
    Spin,
    /// Spins for a while, then sleeps until something is published for it.
    Adaptive,
}

/// Form of the final report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReportForm {
    /// One JSON object on one line.
    Json,
    /// A few lines for people.
    Text,
}

/// What producers do while a consumer's process is dead and its ring is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Completeness {
    /// They wait: nothing is lost.
    Full,
    /// They go on, and drop and count what does not fit.
    Partial,
}

/// What takes over when a worker dies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "u8")]
pub enum Tier {
    /// Tier 1: a process that follows the worker step by step, with state of its own.
    #[value(name = "1")]
    Replica,
    /// Tier 2: a process that waits beside the workers with everything mapped.
    #[value(name = "2")]
    Standby,
    /// Tier 3: a new process, started then.
    #[default]
    #[value(name = "3")]
    Respawn,
}

impl From<Tier> for u8 {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Replica => 1,
            Tier::Standby => 2,
            Tier::Respawn => 3,
        }
    }
}

impl TryFrom<Written> for Tier {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let text = match written {
            Written::Number(number) => number.to_string(),
            Written::Text(text) => text,
        };
        Self::from_str(&text, false)
            .map_err(|_| format!("{text:?} is no tier; there are 1, 2 and 3"))
    }
}

/// A value that a file may give as a number or as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(usize),
    Text(String),
}

/// A number of bytes, written plainly or with KiB, MiB or GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub usize);

impl std::str::FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match text[digits.len()..].trim() {
            "" | "B" => 0,
            "KiB" | "K" | "k" => 10,
            "MiB" | "M" => 20,
            "GiB" | "G" => 30,
            unit => return Err(format!("unknown unit {unit:?}; write bytes, KiB, MiB or GiB")),
        };
        let number: usize = digits
            .parse()
            .map_err(|_| format!("{text:?} is not a number of bytes, such as 4MiB"))?;
        number
            .checked_shl(shift)
            .filter(|bytes| bytes >> shift == number)
            .map(Self)
            .ok_or_else(|| format!("{text} is more than this machine can address"))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Written::deserialize(deserializer)? {
            Written::Number(bytes) => Ok(Self(bytes)),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// How often a worker may die without a commit in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartBudget {
    /// So many deaths in a row are survived.
    pub deaths: u32,
    /// Only those within this time count.
    pub period: Option<Duration>,
}

impl std::str::FromStr for RestartBudget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (deaths, period) = match text.split_once('/') {
            Some((deaths, period)) => (deaths, Some(parse_duration(period)?)),
            None => (text, None),
        };
        let number = deaths.trim().parse();
        let deaths = number
            .map_err(|_| format!("{text:?} is not a number of deaths, such as 8, or 10/1m"))?;
        Ok(Self { deaths, period })
    }
}

impl<'de> Deserialize<'de> for RestartBudget {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u32),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(deaths) => Ok(Self { deaths, period: None }),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// The settings as given: on the command line, or in a file under the same names.
#[derive(Debug, Clone, Default, clap::Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = "Testudo")]
pub struct SettingsArgs {
    /// Name of the job [default: the program's name]
    #[arg(long)]
    name: Option<String>,
    /// Worker processes [default: the number of cores]
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    workers: Option<usize>,
    /// Cores to pin workers to, such as 0,2-5 [default: all that this process may use]
    #[arg(long, value_name = "LIST", allow_negative_numbers = true)]
    cores: Option<String>,
    /// What a worker without input does [default: adaptive]
    #[arg(long, value_enum)]
    idle: Option<Idle>,
    /// Bytes of each ring of an edge, a power of two [default: 4MiB]
    #[arg(long, value_name = "BYTES")]
    ring_bytes: Option<Bytes>,
    /// Key groups of each keyed operator [default: 128]
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    key_groups: Option<usize>,
    /// Ask for huge pages
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    huge_pages: Option<bool>,
    /// Stop after so many records of the job's input
    #[arg(long, value_name = "N", value_parser = whole::<u64>, allow_negative_numbers = true)]
    limit: Option<u64>,
    /// Read so many records a second, all sources together
    #[arg(long, value_name = "N", value_parser = whole::<u64>, allow_negative_numbers = true)]
    rate: Option<u64>,
    /// File for what the job prints, exact across crashes; further prints go to FILE.2 and so on
    /// [default: standard output]
    #[arg(long, value_name = "FILE")]
    print_to: Option<PathBuf>,
    /// File for refused input lines [default: they are only counted]
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
    /// Fail when a source subtask has refused more lines than this
    #[arg(long, value_name = "N", value_parser = whole::<u64>, allow_negative_numbers = true)]
    max_rejects: Option<u64>,
    /// Read each input file whole, honouring line ends inside quotes
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    no_split: Option<bool>,
    /// Whether producers wait for a dead consumer or drop records for it [default: full, if every
    /// source can be read again]
    #[arg(long, value_enum)]
    completeness: Option<Completeness>,
    /// Longest that a batch may wait between two workers, such as 5ms [default: no limit]
    #[arg(long, value_name = "TIME")]
    max_latency: Option<String>,
    /// Longest that the recovery of a worker may take, such as 20ms [default: no limit]
    #[arg(long, value_name = "TIME")]
    max_recovery: Option<String>,
    /// Deaths of a worker in a row, without a commit in between, that the job survives; with a
    /// period, those within it, such as 10/1m [default: 8]
    #[arg(long, value_name = "N[/TIME]", visible_alias = "restart-budget")]
    #[serde(alias = "restart-budget")]
    max_restarts: Option<RestartBudget>,
    /// Time without a finished step after which a worker that has something to do is killed; 0
    /// for never [default: 10s]
    #[arg(long, value_name = "TIME")]
    hang_timeout: Option<String>,
    /// File for records that killed their worker again and again
    /// [default: NAME.dead-letters.jsonl beside the output]
    #[arg(long, value_name = "FILE")]
    dead_letters: Option<PathBuf>,
    /// What takes over when a worker dies: 2 a process that stands by, 3 a new one [default: 3, or
    /// 2 where --max-recovery leaves less time than a new process may take]
    #[arg(long, value_enum, value_name = "TIER")]
    tier: Option<Tier>,
    /// Standbys that the workers of tier 2 share [default: 1]
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    standbys: Option<usize>,
    /// Take archived records from other workers without validating them
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    trust_records: Option<bool>,
    /// Folder for checkpoints; without one, none is taken
    #[arg(long, value_name = "DIR")]
    checkpoint_dir: Option<PathBuf>,
    /// Second folder for checkpoints, used while the first one fails; best on another disk
    #[arg(long, value_name = "DIR")]
    checkpoint_dir_2: Option<PathBuf>,
    /// Time between two checkpoints, such as 200ms, 1s, 5m, or never [default: 10s]
    #[arg(long, value_name = "TIME")]
    checkpoint_interval: Option<Schedule>,
    /// Checkpoints by the clock (UTC), as five fields: minute, hour, day, month, weekday
    #[arg(long, value_name = "PATTERN", value_parser = by_the_clock)]
    #[arg(conflicts_with = "checkpoint_interval")]
    checkpoint_at: Option<Schedule>,
    /// Bytes a second that all workers' checkpoints may write [default: no limit]
    #[arg(long, value_name = "BYTES")]
    checkpoint_bandwidth: Option<Bytes>,
    /// Memory of each worker for blocks that change while they are being saved [default: 256MiB]
    #[arg(long, value_name = "BYTES")]
    checkpoint_memory: Option<Bytes>,
    /// Time after which a region's part of a checkpoint is given up [default: 60s]
    #[arg(long, value_name = "TIME")]
    checkpoint_deadline: Option<String>,
    /// How files of checkpoints are written [default: auto]
    #[arg(long, value_enum)]
    disk: Option<DiskChoice>,
    /// Bytes beyond which a checkpoint ends a part of a folder output [default: 128MiB]
    #[arg(long, value_name = "BYTES")]
    part_bytes: Option<Bytes>,
    /// Go on from the newest whole checkpoint in the folder
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    resume: Option<bool>,
    /// Go on from this checkpoint: its number, or the path of its manifest
    #[arg(long, value_name = "ID|PATH")]
    resume_from: Option<String>,
    /// Bytes a second that the rest of a resumed state is loaded with [default: no limit]
    #[arg(long, value_name = "BYTES")]
    load_bandwidth: Option<Bytes>,
    /// Resume although an operator that had state is not in the job any more
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_dropped_state: Option<bool>,
    /// Serve metrics for Prometheus, and /healthz, at this address: 127.0.0.1:PORT, or 127.0.0.1:0
    /// for any free port
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Allow an address for --listen that other machines can reach
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    listen_openly: Option<bool>,
    /// Form of the final report on standard error [default: text]
    #[arg(long, value_enum)]
    report: Option<ReportForm>,
    /// Print the plan and its limits instead of running
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    explain: Option<bool>,
    /// Show no progress, even on a terminal
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    no_progress: Option<bool>,
    /// TOML file with these settings
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
}

/// How files of checkpoints are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DiskChoice {
    /// By io_uring, where the system allows it.
    Auto,
    /// By io_uring, or not at all.
    Uring,
    /// By a helper thread with plain calls.
    Pwrite,
}

/// Complete settings of a job.
///
/// ```
/// let settings = testudo::config::Settings { workers: 2, ..Default::default() };
/// assert_eq!(settings.ring_bytes, 4 << 20);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Name of the job.
    pub name: String,
    /// Worker processes that stages are spread over.
    pub workers: usize,
    /// Cores to pin workers to, in order.
    pub cores: Vec<usize>,
    /// What a worker without input does.
    pub idle: Idle,
    /// Bytes of each ring: a power of two, at least a page.
    pub ring_bytes: usize,
    /// Key groups of each keyed operator.
    pub key_groups: usize,
    /// Ask for huge pages.
    pub huge_pages: bool,
    /// Records after which all sources of the job stop.
    pub limit: Option<u64>,
    /// Records a second of all sources together.
    pub rate: Option<u64>,
    /// File for what the job prints, instead of standard output.
    pub print_to: Option<PathBuf>,
    /// File for refused input.
    pub rejects: Option<PathBuf>,
    /// Refused inputs of a source subtask after which the job fails.
    pub max_rejects: Option<u64>,
    /// Input files are not cut.
    pub no_split: bool,
    /// What producers do when a consumer is dead; by default what the job says, else full if every
    /// source can be read again, partial if not.
    pub completeness: Option<Completeness>,
    /// The longest that a batch may wait between two workers.
    pub max_latency: Option<Duration>,
    /// The longest that the recovery of a worker may take.
    pub max_recovery: Option<Duration>,
    /// Deaths in a row without a commit that the job survives.
    pub restart_budget: u32,
    /// Only those within this time count.
    pub restart_period: Option<Duration>,
    /// Time without a finished step after which a worker is killed; zero for never.
    pub hang_timeout: Duration,
    /// File for records that killed their worker again and again.
    pub dead_letters: Option<PathBuf>,
    /// What takes over when a worker dies, where its stage does not say otherwise; without a word
    /// `max_recovery` decides.
    pub tier: Option<Tier>,
    /// Standbys that the workers of tier 2 share.
    pub standbys: usize,
    /// Archived records are taken without validation.
    pub trust_records: bool,
    /// Folder for checkpoints.
    pub checkpoint_dir: Option<PathBuf>,
    /// Second folder, used while the first one fails.
    pub checkpoint_dir_2: Option<PathBuf>,
    /// When checkpoints are taken.
    pub checkpoints: Schedule,
    /// Bytes a second that all workers' checkpoints may write.
    pub checkpoint_bandwidth: Option<u64>,
    /// Bytes of each worker for blocks that change while they are being saved.
    pub checkpoint_memory: usize,
    /// Time after which a region's part of a checkpoint is given up.
    pub checkpoint_deadline: Duration,
    /// How files of checkpoints are written.
    pub disk: DiskChoice,
    /// Bytes beyond which a checkpoint ends a part of a folder output.
    pub part_bytes: u64,
    /// Go on from the newest whole checkpoint.
    pub resume: bool,
    /// Go on from this checkpoint: its number, or the path of its manifest.
    pub resume_from: Option<String>,
    /// Bytes a second that the rest of a resumed state is loaded with.
    pub load_bandwidth: Option<u64>,
    /// State of operators that are not in the job any more may be dropped.
    pub allow_dropped_state: bool,
    /// Where metrics are served.
    pub listen: Option<SocketAddr>,
    /// Other machines may be able to reach that.
    pub listen_openly: bool,
    /// Form of the final report.
    pub report: ReportForm,
    /// Print the plan instead of running.
    pub explain: bool,
    /// Show progress when standard error is a terminal.
    pub progress: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let cores = usable_cores();
        Self {
            name: "job".into(),
            workers: cores.len().max(1),
            cores,
            idle: Idle::Adaptive,
            ring_bytes: 4 << 20,
            key_groups: 128,
            huge_pages: false,
            limit: None,
            rate: None,
            print_to: None,
            rejects: None,
            max_rejects: None,
            no_split: false,
            completeness: None,
            max_latency: None,
            max_recovery: None,
            restart_budget: 8,
            restart_period: None,
            hang_timeout: Duration::from_secs(10),
            dead_letters: None,
            tier: None,
            standbys: 1,
            trust_records: false,
            checkpoint_dir: None,
            checkpoint_dir_2: None,
            checkpoints: Schedule::Every(Duration::from_secs(10)),
            checkpoint_bandwidth: None,
            checkpoint_memory: 256 << 20,
            checkpoint_deadline: Duration::from_secs(60),
            disk: DiskChoice::Auto,
            part_bytes: 128 << 20,
            resume: false,
            resume_from: None,
            load_bandwidth: None,
            allow_dropped_state: false,
            listen: None,
            listen_openly: false,
            report: ReportForm::Text,
            explain: false,
            progress: true,
        }
    }
}

/// The cores that this process may run on.
#[must_use]
pub fn usable_cores() -> Vec<usize> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    if cores.is_empty() { vec![0] } else { cores.into_iter().map(|core| core.id).collect() }
}

impl SettingsArgs {
    /// Puts flags, file and defaults together and checks the result.
    ///
    /// # Errors
    /// What is wrong with a value, the file, or a key in it.
    pub fn resolve(self, program: &str) -> Result<Settings, Error> {
        let file = match &self.config {
            Some(path) => read_file(path)?,
            None => Self::default(),
        };
        let settings =
            self.or(file).over(Settings { name: program.into(), ..Settings::default() })?;
        settings.check()?;
        Ok(settings)
    }

    /// These, and the others where these say nothing.
    fn or(self, other: Self) -> Self {
        Self {
            name: self.name.or(other.name),
            workers: self.workers.or(other.workers),
            cores: self.cores.or(other.cores),
            idle: self.idle.or(other.idle),
            ring_bytes: self.ring_bytes.or(other.ring_bytes),
            key_groups: self.key_groups.or(other.key_groups),
            huge_pages: self.huge_pages.or(other.huge_pages),
            limit: self.limit.or(other.limit),
            rate: self.rate.or(other.rate),
            print_to: self.print_to.or(other.print_to),
            rejects: self.rejects.or(other.rejects),
            max_rejects: self.max_rejects.or(other.max_rejects),
            no_split: self.no_split.or(other.no_split),
            completeness: self.completeness.or(other.completeness),
            max_latency: self.max_latency.or(other.max_latency),
            max_recovery: self.max_recovery.or(other.max_recovery),
            max_restarts: self.max_restarts.or(other.max_restarts),
            hang_timeout: self.hang_timeout.or(other.hang_timeout),
            dead_letters: self.dead_letters.or(other.dead_letters),
            tier: self.tier.or(other.tier),
            standbys: self.standbys.or(other.standbys),
            trust_records: self.trust_records.or(other.trust_records),
            checkpoint_dir: self.checkpoint_dir.or(other.checkpoint_dir),
            checkpoint_dir_2: self.checkpoint_dir_2.or(other.checkpoint_dir_2),
            checkpoint_interval: self.checkpoint_interval.or(other.checkpoint_interval),
            checkpoint_at: self.checkpoint_at.or(other.checkpoint_at),
            checkpoint_bandwidth: self.checkpoint_bandwidth.or(other.checkpoint_bandwidth),
            checkpoint_memory: self.checkpoint_memory.or(other.checkpoint_memory),
            checkpoint_deadline: self.checkpoint_deadline.or(other.checkpoint_deadline),
            disk: self.disk.or(other.disk),
            part_bytes: self.part_bytes.or(other.part_bytes),
            resume: self.resume.or(other.resume),
            resume_from: self.resume_from.or(other.resume_from),
            load_bandwidth: self.load_bandwidth.or(other.load_bandwidth),
            allow_dropped_state: self.allow_dropped_state.or(other.allow_dropped_state),
            listen: self.listen.or(other.listen),
            listen_openly: self.listen_openly.or(other.listen_openly),
            report: self.report.or(other.report),
            explain: self.explain.or(other.explain),
            no_progress: self.no_progress.or(other.no_progress),
            config: None,
        }
    }

    fn over(self, base: Settings) -> Result<Settings, Error> {
        let cores = match &self.cores {
            Some(list) => parse_cores(list).map_err(Error::Usage)?,
            None => base.cores,
        };
        let default_workers = if self.cores.is_some() { cores.len() } else { base.workers };
        Ok(Settings {
            name: self.name.unwrap_or(base.name),
            workers: self.workers.unwrap_or(default_workers),
            cores,
            idle: self.idle.unwrap_or(base.idle),
            ring_bytes: self.ring_bytes.map_or(base.ring_bytes, |bytes| bytes.0),
            key_groups: self.key_groups.unwrap_or(base.key_groups),
            huge_pages: self.huge_pages.unwrap_or(base.huge_pages),
            limit: self.limit.or(base.limit),
            rate: self.rate.or(base.rate),
            print_to: self.print_to.or(base.print_to),
            rejects: self.rejects.or(base.rejects),
            max_rejects: self.max_rejects.or(base.max_rejects),
            no_split: self.no_split.unwrap_or(base.no_split),
            completeness: self.completeness.or(base.completeness),
            max_latency: limit("--max-latency", self.max_latency.as_deref(), base.max_latency)?,
            max_recovery: limit("--max-recovery", self.max_recovery.as_deref(), base.max_recovery)?,
            restart_budget: self.max_restarts.map_or(base.restart_budget, |max| max.deaths),
            restart_period: self.max_restarts.map_or(base.restart_period, |max| max.period),
            hang_timeout: match self.hang_timeout.as_deref() {
                None => base.hang_timeout,
                Some("0" | "never") => Duration::ZERO,
                Some(text) => parse_duration(text)
                    .map_err(|why| Error::Usage(format!("--hang-timeout: {why}")))?,
            },
            dead_letters: self.dead_letters.or(base.dead_letters),
            tier: self.tier.or(base.tier),
            standbys: self.standbys.unwrap_or(base.standbys),
            trust_records: self.trust_records.unwrap_or(base.trust_records),
            checkpoint_dir: self.checkpoint_dir.or(base.checkpoint_dir),
            checkpoint_dir_2: self.checkpoint_dir_2.or(base.checkpoint_dir_2),
            // By the clock, if that was asked for on the same level or a nearer one.
            checkpoints: self
                .checkpoint_at
                .or(self.checkpoint_interval)
                .unwrap_or(base.checkpoints),
            checkpoint_bandwidth: self
                .checkpoint_bandwidth
                .map_or(base.checkpoint_bandwidth, |bytes| Some(bytes.0 as u64)),
            checkpoint_memory: self.checkpoint_memory.map_or(base.checkpoint_memory, |b| b.0),
            checkpoint_deadline: match &self.checkpoint_deadline {
                None => base.checkpoint_deadline,
                Some(text) => parse_duration(text)
                    .map_err(|why| Error::Usage(format!("--checkpoint-deadline: {why}")))?,
            },
            disk: self.disk.unwrap_or(base.disk),
            part_bytes: self.part_bytes.map_or(base.part_bytes, |bytes| bytes.0 as u64),
            resume: self.resume.unwrap_or(base.resume),
            resume_from: self.resume_from.or(base.resume_from),
            load_bandwidth: self
                .load_bandwidth
                .map_or(base.load_bandwidth, |bytes| Some(bytes.0 as u64)),
            allow_dropped_state: self.allow_dropped_state.unwrap_or(base.allow_dropped_state),
            listen: self.listen.or(base.listen),
            listen_openly: self.listen_openly.unwrap_or(base.listen_openly),
            report: self.report.unwrap_or(base.report),
            explain: self.explain.unwrap_or(base.explain),
            progress: !self.no_progress.unwrap_or(!base.progress),
        })
    }
}

impl Settings {
    /// Checks what a type cannot.
    ///
    /// # Errors
    /// The offending value and what it should be.
    pub fn check(&self) -> Result<(), Error> {
        let usage = |message: String| Err(Error::Usage(message));
        let limit = crate::plan::WORKERS_MAX;
        if self.workers == 0 || self.workers > limit {
            return usage(format!("--workers {}: a job has 1 to {limit} workers", self.workers));
        }
        if self.name.is_empty() || self.name.contains(['/', '\0', '\n']) {
            return usage(format!(
                "--name {:?}: a name has one letter at least, and no slashes or line ends",
                self.name
            ));
        }
        if !self.ring_bytes.is_power_of_two() || !(4096..=1 << 30).contains(&self.ring_bytes) {
            return usage(format!(
                "--ring-bytes {}: a ring is a power of two from 4KiB to 1GiB, such as {}",
                self.ring_bytes,
                self.ring_bytes.clamp(4096, 1 << 30).next_power_of_two()
            ));
        }
        if self.key_groups == 0 || self.key_groups > 32_768 {
            return usage(format!(
                "--key-groups {}: a keyed operator has 1 to 32768 key groups",
                self.key_groups
            ));
        }
        if self.rate == Some(0) {
            return usage(
                "--rate 0: a job that reads nothing never ends; leave it out for full speed".into(),
            );
        }
        if self.standbys == 0 {
            return usage("--standbys 0: tier 2 needs one at least; for none, --tier 3".into());
        }
        if let Some(address) = self.listen
            && !address.ip().is_loopback()
            && !self.listen_openly
        {
            return usage(format!(
                "--listen {address}: other machines could reach it, and there is no password; \
                 use 127.0.0.1:{}, or allow it with --listen-openly",
                address.port()
            ));
        }
        self.check_checkpoints()?;
        let usable = usable_cores();
        if let Some(core) = self.cores.iter().find(|core| !usable.contains(core)) {
            return usage(format!(
                "--cores: core {core} is not among those this process may use {usable:?}"
            ));
        }
        Ok(())
    }
}

impl Settings {
    /// How often a worker may die without a commit in between.
    #[must_use]
    pub fn restarts(&self) -> RestartBudget {
        RestartBudget { deaths: self.restart_budget, period: self.restart_period }
    }

    fn check_checkpoints(&self) -> Result<(), Error> {
        let usage = |message: &str| Err(Error::Usage(message.into()));
        if self.checkpoint_dir.is_none() && (self.resume || self.resume_from.is_some()) {
            return usage("--resume needs --checkpoint-dir DIR: the folder to resume from");
        }
        if self.checkpoint_dir_2.is_some() && self.checkpoint_dir_2 == self.checkpoint_dir {
            return usage("--checkpoint-dir-2 is the same folder as --checkpoint-dir");
        }
        if self.checkpoint_dir_2.is_some() && self.checkpoint_dir.is_none() {
            return usage("--checkpoint-dir-2 needs --checkpoint-dir DIR: the folder before it");
        }
        if self.checkpoint_bandwidth == Some(0) || self.load_bandwidth == Some(0) {
            return usage(
                "a bandwidth of 0 would never write or load anything; leave it out for no limit",
            );
        }
        if self.checkpoint_memory < 1 << 20 {
            return usage("--checkpoint-memory: at least 1MiB, or no checkpoint can be taken");
        }
        Ok(())
    }
}

/// A time that is a limit.
fn limit(
    flag: &str,
    text: Option<&str>,
    base: Option<Duration>,
) -> Result<Option<Duration>, Error> {
    let Some(text) = text else { return Ok(base) };
    let micros = text.strip_suffix("us").and_then(|number| number.parse().ok());
    match micros.filter(|us| (1..1_000_000).contains(us)).map(Duration::from_micros) {
        Some(limit) => Ok(Some(limit)),
        None => parse_duration(text)
            .map(Some)
            .map_err(|why| Error::Usage(format!("{flag}: {why}; or in microseconds: 500us"))),
    }
}

fn read_file(path: &Path) -> Result<SettingsArgs, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Error::Usage(format!("cannot read --config {}: {error}", path.display()))
    })?;
    toml::from_str(&text).map_err(|error| {
        Error::Usage(format!("--config {}: {}", path.display(), error.to_string().trim_end()))
    })
}

/// Parses a pattern of the clock.
fn by_the_clock(text: &str) -> Result<Schedule, String> {
    text.parse().map(Schedule::At)
}

/// Parses a number of things.
fn whole<N: std::str::FromStr>(text: &str) -> Result<N, String> {
    text.parse().map_err(|_| "write a whole number, such as 2".to_owned())
}

/// Parses 0,2-5.
fn parse_cores(list: &str) -> Result<Vec<usize>, String> {
    let bad = || format!("--cores {list:?}: write core numbers, such as 0,2-5");
    let mut cores = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().map_err(|_| bad())?;
        let last: usize = last.trim().parse().map_err(|_| bad())?;
        if first > last || last > 4095 {
            return Err(bad());
        }
        for core in first..=last {
            if cores.contains(&core) {
                return Err(format!("--cores {list:?}: core {core} is named twice"));
            }
            cores.push(core);
        }
    }
    Ok(cores)
}
