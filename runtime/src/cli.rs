//! The command line that every job has.
//!
//! Called by `testudo::main`.

use crate::config::SettingsArgs;
use crate::error::Error;
use crate::flow::Flow;
use crate::supervisor::launch::Launch;
use crate::supervisor::watch::{Events, signal_fd};
use crate::worker::entry;
use clap::{Args, CommandFactory, FromArgMatches, Parser};
use std::process::ExitCode;
use std::sync::Arc;

/// A job without options of its own.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct NoOptions {}

#[derive(Debug, Parser)]
struct Command<O: Args> {
    #[command(flatten)]
    options: O,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// What `--help` begins with.
const ABOUT: &str =
    "A Testudo job. Ctrl-C lets it finish what it has read; a second one ends it at once.";

/// Runs a job with the standard command line: the whole main of a job's program.
///
/// `build` describes the flow from the job's own options (a type that derives `clap::Args`). It
/// runs in the launching process and again in every worker, and must describe the same flow each
/// time.
pub fn main<O: Args>(build: impl Fn(&Flow, &O)) -> ExitCode {
    main_with(build, |_, _| Ok(()))
}

/// As [`main`], calling `after` in the launching process once the job has ended well.
pub fn main_with<O: Args>(
    build: impl Fn(&Flow, &O),
    after: impl FnOnce(&O, &crate::supervisor::report::Report) -> Result<(), String>,
) -> ExitCode {
    crate::init();
    let program = program_name();
    // Said here: the flattened arguments' own comments would stand in its place otherwise.
    let command = Command::<O>::command().about(ABOUT).long_about(None);
    let parsed = command
        .try_get_matches()
        .and_then(|matches| Command::<O>::from_arg_matches(&matches))
        .unwrap_or_else(|error| error.exit());
    if let Some(role) = entry::role() {
        entry::run(role, |flow, _| build(flow, &parsed.options));
    }
    match launch(&program, parsed, &build, after) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::say!("{program}: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn launch<O: Args>(
    program: &str,
    parsed: Command<O>,
    build: &impl Fn(&Flow, &O),
    after: impl FnOnce(&O, &crate::supervisor::report::Report) -> Result<(), String>,
) -> Result<(), Error> {
    let settings = parsed.settings.resolve(program)?;
    let options = parsed.options;
    let draw = |flow: &Flow| build(flow, &options);
    let (form, explain) = (settings.report, settings.explain);
    let mut launch = Launch { settings, parameters: String::new(), entry: 0, signals: None };
    if explain {
        print!("{}", launch.explain(draw)?);
        return Ok(());
    }
    launch.signals = Some(signal_fd()?);
    crate::supervisor::launch::name_supervisor();
    let report = launch.run(draw, Arc::<Events>::default(), |_| ())?;
    crate::say_part!("{}", report.text(form));
    after(&options, &report).map_err(|message| Error::job("after the job", message))
}

/// The program's file name: the job's default name.
fn program_name() -> String {
    let first = std::env::args_os().next().unwrap_or_default();
    let path = std::path::Path::new(&first);
    path.file_stem().map_or("job".into(), |name| name.to_string_lossy().into_owned())
}
