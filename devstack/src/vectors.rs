//! The development vector server: Qdrant's gRPC API over Qdrant's own engine, in a program of its own.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::error::{IoContext, StartError};
use crate::launch::Launch;
use crate::probe;
use crate::server::{Engine, READY_WITHIN, Server};

/// Names the program; set it to skip the search and the build.
pub const BINARY_VARIABLE: &str = "FLOTILLA_VECTORS_BIN";
/// Builds the program if its sources changed, and prints its path as the last line.
const BUILD_SCRIPT: &str = "scripts/build-vectors.sh";
const INSTALL: &str = "Run scripts/build-vectors.sh in the repository (needs cargo and gcc: \
                       apt install build-essential | dnf install gcc | pacman -S gcc | xcode-select --install) and set \
                       FLOTILLA_VECTORS_BIN to the path it prints, or set QDRANT_URL to a running Qdrant";

/// A private vector server. URL (gRPC): `http://127.0.0.1:PORT`.
pub type Vectors = Server<VectorsEngine>;

/// How to start the vector server.
#[derive(Clone, Debug)]
pub struct VectorsOptions {
    /// TCP port on 127.0.0.1; `None`: a free one.
    pub port: Option<u16>,
    /// Limit for the start, recovery included (the build of the program is not).
    pub ready_within: Duration,
    /// The program; `None`: from `FLOTILLA_VECTORS_BIN`, else what `scripts/build-vectors.sh` prints.
    pub program: Option<PathBuf>,
}

impl Default for VectorsOptions {
    fn default() -> Self {
        Self { port: None, ready_within: READY_WITHIN, program: None }
    }
}

/// How [`Vectors`] differs from the other services.
#[derive(Debug)]
pub struct VectorsEngine {
    program: PathBuf,
    dir: PathBuf,
}

impl Engine for VectorsEngine {
    type Options = VectorsOptions;
    const NAME: &'static str = "vectors";
    const STOP: Signal = Signal::SIGTERM;
    const DISCARD: Signal = Signal::SIGKILL;

    fn wishes(options: &VectorsOptions) -> (Option<u16>, Duration) {
        (options.port, options.ready_within)
    }

    async fn prepare(dir: &Path, options: VectorsOptions) -> Result<Self, StartError> {
        let named = options.program.or_else(|| std::env::var_os(BINARY_VARIABLE).map(PathBuf::from));
        let program = match named {
            Some(program) if program.is_file() => program.canonicalize().context("cannot find", &program)?,
            Some(program) => {
                return Err(StartError::MissingProgram {
                    program: "flotilla-vectors",
                    looked_in: format!("{BINARY_VARIABLE} names {}, which is not a file", program.display()),
                    install: INSTALL,
                });
            }
            None => build().await?,
        };
        let data = dir.join("data");
        std::fs::create_dir_all(&data).context("cannot create", &data)?;
        Ok(Self { program, dir: dir.to_owned() })
    }

    async fn launch(&self, port: u16) -> Result<Launch, StartError> {
        let data = self.dir.join("data");
        let listen = format!("127.0.0.1:{port}");
        Ok(Launch {
            program: self.program.clone(),
            args: vec!["--data".into(), data.into(), "--listen".into(), listen.into()],
            cwd: self.dir.clone(),
            account: None,
        })
    }

    fn url(port: u16) -> String {
        format!("http://127.0.0.1:{port}")
    }

    async fn probe(&self, url: &str, _pid: u32) -> Result<(), String> {
        probe::vectors(url).await
    }
}

/// Runs the build script, which answers at once when nothing changed; the first build takes several minutes, and its
/// progress goes to our stderr.
async fn build() -> Result<PathBuf, StartError> {
    let missing = |looked_in: String| StartError::MissingProgram {
        program: "flotilla-vectors",
        looked_in,
        install: INSTALL,
    };
    let Some(script) = find_script() else {
        return Err(missing(format!(
            "{BINARY_VARIABLE} is not set and no {BUILD_SCRIPT} is in this directory or above it"
        )));
    };
    tracing::info!("building the vector server if its sources changed; the first time takes several minutes");
    let output = tokio::process::Command::new(&script)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .output()
        .await
        .context("cannot run", &script)?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(StartError::Preparation {
            what: script.display().to_string(),
            status: output.status.to_string(),
            output: text.into_owned(),
        });
    }
    let program = PathBuf::from(text.lines().last().unwrap_or_default().trim());
    if program.is_file() {
        return Ok(program);
    }
    Err(missing(format!("{} printed `{}`, which is not a file", script.display(), program.display())))
}

/// From the working directory upwards, then from the package under test upwards (cargo sets its directory).
fn find_script() -> Option<PathBuf> {
    let here = std::env::current_dir().ok();
    let package = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    [here, package]
        .into_iter()
        .flatten()
        .find_map(|start| start.ancestors().map(|dir| dir.join(BUILD_SCRIPT)).find(|script| script.is_file()))
}
