//! Files on the caller's machine: the input files of a run, and the artifacts that it returns.

use std::{
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use polydev_client::Input;
use polydev_proto::{
    runtime::{Artifact, Artifacts, InputFile, Output, input_file::Source, run_event::Event},
    workspace,
};
use tempfile::NamedTempFile;
use tokio::io::AsyncReadExt;

use super::stream::MAX_CHUNK;

/// `SOURCE[:PATH]`: a file on this machine, and its path in the run's workspace.
#[derive(Debug, Clone)]
pub(super) struct Given {
    source: PathBuf,
    path: String,
}

impl std::str::FromStr for Given {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (source, path) = match text.rsplit_once(':') {
            Some((source, path)) => (source, Some(path.to_owned())),
            None => (text, None),
        };
        let source = PathBuf::from(source);
        let name = || Some(source.file_name()?.to_str()?.to_owned());
        let path = path.or_else(name);
        let path = path.ok_or_else(|| format!("`{text}` must be SOURCE[:PATH] of a file"))?;
        Ok(Self { source, path })
    }
}

/// Files that are open for reading.
pub(super) struct Opened(Vec<(tokio::fs::File, InputFile)>);

fn size(file: &InputFile) -> u64 {
    match file.source {
        Some(Source::Size(size)) => size,
        Some(Source::Content(_)) | None => 0,
    }
}

impl Opened {
    pub(super) async fn new(given: &[Given]) -> anyhow::Result<Self> {
        let mut opened = Vec::new();
        for Given { source, path } in given {
            let open = async {
                let file = tokio::fs::File::open(source).await?;
                let metadata = file.metadata().await?;
                ensure!(metadata.is_file(), "it is not a regular file");
                Ok((file, metadata))
            };
            let named = || format!("cannot read `{}`", source.display());
            let (file, metadata) = open.await.with_context(named)?;
            let of_run = InputFile {
                path: path.clone(),
                mode: metadata.permissions().mode() & 0o777,
                source: Some(Source::Size(metadata.len())),
            };
            opened.push((file, of_run));
        }
        Ok(Self(opened))
    }

    pub(super) fn list(&self) -> Vec<InputFile> {
        self.0.iter().map(|(_, file)| file.clone()).collect()
    }

    /// The files with their content, for a call that is not a stream.
    pub(super) async fn read(self) -> anyhow::Result<Vec<InputFile>> {
        let mut files = Vec::new();
        for (file, mut of_run) in self.0 {
            let (path, size) = (&of_run.path, size(&of_run));
            let mut content = Vec::new();
            let read = file.take(size).read_to_end(&mut content).await;
            let read = read.with_context(|| format!("cannot read `{path}`"))?;
            ensure!(
                read as u64 == size,
                "`{path}` ends after {read} of {size} bytes"
            );
            of_run.source = Some(Source::Content(content.into()));
            files.push(of_run);
        }
        Ok(files)
    }

    /// Sends the content of the files. If a file has become shorter, the run ends before its
    /// command starts.
    pub(super) async fn send(self, input: &Input) {
        for (file, of_run) in self.0 {
            let (path, size) = (&of_run.path, size(&of_run));
            let mut content = file.take(size);
            let mut sent = 0;
            while sent < size {
                let mut chunk = Vec::with_capacity(MAX_CHUNK);
                let mut next = (&mut content).take(MAX_CHUNK as u64);
                if !matches!(next.read_to_end(&mut chunk).await, Ok(1..)) {
                    eprintln!("polydev-shim: `{path}` ends after {sent} of {size} bytes");
                    return input.close();
                }
                sent += chunk.len() as u64;
                if input.write(chunk).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Writes artifacts below a folder. Each file appears when it is complete.
pub(super) struct Receiver {
    folder: PathBuf,
    expected: std::vec::IntoIter<Artifact>,
    /// The artifact that is being written, and how many of its bytes are missing.
    current: Option<(Artifact, NamedTempFile, u64)>,
    /// Offset of the next byte in the stream of all artifacts.
    offset: u64,
    lost: bool,
}

impl Receiver {
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            expected: Vec::new().into_iter(),
            current: None,
            offset: 0,
            lost: false,
        }
    }

    /// # Errors
    /// If an artifact cannot be written.
    pub(super) fn on(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::Artifacts(artifacts) => self.begin(artifacts),
            Event::ArtifactData(output) => self.write(output),
            _ => Ok(()),
        }
    }

    fn begin(&mut self, artifacts: &Artifacts) -> anyhow::Result<()> {
        for left_out in &artifacts.left_out {
            let (path, reason) = (&left_out.path, &left_out.reason);
            eprintln!("polydev-shim: artifact `{path}` is left out: {reason}");
        }
        let more = artifacts.left_out_count as usize - artifacts.left_out.len();
        if more > 0 {
            eprintln!("polydev-shim: {more} more artifacts are left out");
        }
        self.expected = artifacts.files.clone().into_iter();
        self.next()
    }

    /// Opens the next artifact that has content. Empty artifacts are complete at once.
    fn next(&mut self) -> anyhow::Result<()> {
        while let Some(artifact) = self.expected.next() {
            // The list comes from the container, which may be hostile.
            if let Err(problem) = workspace::check_path(&artifact.path) {
                bail!("the shim's list of artifacts has a path that {problem}");
            }
            let path = self.folder.join(&artifact.path);
            let folder = path.parent().unwrap_or(&self.folder);
            let open = || {
                refuse_links(&self.folder, &artifact.path)?;
                std::fs::create_dir_all(folder)?;
                NamedTempFile::new_in(folder)
            };
            let open = open().with_context(|| format!("cannot write `{}`", path.display()))?;
            let missing = artifact.size;
            self.current = Some((artifact, open, missing));
            if missing > 0 {
                return Ok(());
            }
            self.finish_current()?;
        }
        Ok(())
    }

    fn write(&mut self, output: &Output) -> anyhow::Result<()> {
        let mut rest = &output.data[..];
        // A gap has been reported as lost. After it, the limits between files are unknown.
        self.lost |= output.offset != self.offset;
        self.offset = output.offset + output.data.len() as u64;
        if self.lost {
            return Ok(());
        }
        while let (false, Some((artifact, open, missing))) = (rest.is_empty(), &mut self.current) {
            let most = usize::try_from(*missing).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(most.min(rest.len()));
            let written = open.write_all(now);
            written.with_context(|| format!("cannot write `{}`", artifact.path))?;
            *missing -= now.len() as u64;
            rest = later;
            if *missing == 0 {
                self.finish_current()?;
                self.next()?;
            }
        }
        Ok(())
    }

    fn finish_current(&mut self) -> anyhow::Result<()> {
        let Some((artifact, open, _)) = self.current.take() else {
            return Ok(());
        };
        let path = self.folder.join(&artifact.path);
        let keep = || {
            // Only permission bits, whatever the list says.
            let mode = std::fs::Permissions::from_mode(artifact.mode & 0o777);
            open.as_file().set_permissions(mode)?;
            open.persist(&path)?;
            anyhow::Ok(())
        };
        keep().with_context(|| format!("cannot write `{}`", path.display()))
    }

    /// Whether every announced artifact has arrived.
    pub(super) fn is_complete(&self) -> bool {
        !self.lost && self.current.is_none() && self.expected.len() == 0
    }
}

/// Rejects paths below a symlink, which could lead out of the folder.
fn refuse_links(folder: &Path, path: &str) -> std::io::Result<()> {
    let above = Path::new(path).ancestors().skip(1);
    for part in above.filter(|part| *part != Path::new("")) {
        let part = folder.join(part);
        if part
            .symlink_metadata()
            .is_ok_and(|found| found.is_symlink())
        {
            let words = format!("`{}` is a link", part.display());
            return Err(std::io::Error::other(words));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn artifact(path: &str, size: u64) -> Artifact {
        Artifact {
            path: path.into(),
            mode: 0o640,
            size,
        }
    }

    fn data(offset: u64, data: &'static str) -> Event {
        let data = Bytes::from_static(data.as_bytes());
        Event::ArtifactData(Output { offset, data })
    }

    fn list(files: Vec<Artifact>) -> Event {
        Event::Artifacts(Artifacts {
            files,
            ..Artifacts::default()
        })
    }

    #[test]
    fn artifacts_are_told_apart_by_their_lengths() {
        let folder = tempfile::tempdir().unwrap();
        let mut receiver = Receiver::new(folder.path());
        let files = vec![artifact("a/b", 3), artifact("empty", 0), artifact("c", 2)];
        receiver.on(&list(files)).unwrap();
        receiver.on(&data(0, "he")).unwrap();
        assert!(!folder.path().join("a/b").exists(), "half an artifact");
        receiver.on(&data(2, "llo")).unwrap();
        assert!(receiver.is_complete());
        let read = |path: &str| std::fs::read_to_string(folder.path().join(path)).unwrap();
        assert_eq!(
            (&*read("a/b"), &*read("empty"), &*read("c")),
            ("hel", "", "lo")
        );
        let mode = std::fs::metadata(folder.path().join("c")).unwrap();
        assert_eq!(mode.permissions().mode() & 0o777, 0o640);
    }

    #[test]
    fn a_gap_leaves_what_follows_incomplete() {
        let folder = tempfile::tempdir().unwrap();
        let mut receiver = Receiver::new(folder.path());
        receiver
            .on(&list(vec![artifact("a", 2), artifact("b", 2)]))
            .unwrap();
        receiver.on(&data(0, "aa")).unwrap();
        receiver.on(&data(3, "b")).unwrap();
        assert!(!receiver.is_complete());
        assert!(folder.path().join("a").exists() && !folder.path().join("b").exists());
    }

    #[test]
    fn a_path_that_leaves_the_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/tmp", folder.path().join("link")).unwrap();
        for path in ["../x", "/x", "a/../../x", "link/x"] {
            let mut receiver = Receiver::new(folder.path());
            assert!(
                receiver.on(&list(vec![artifact(path, 0)])).is_err(),
                "{path}"
            );
        }
    }

    #[test]
    fn a_file_is_named_like_its_source_unless_it_is_said() {
        let given = |text: &str| text.parse::<Given>().map(|given| given.path);
        assert_eq!(given("/a/b.py").unwrap(), "b.py");
        assert_eq!(given("/a/b.py:src/c.py").unwrap(), "src/c.py");
        assert!(given("/").is_err());
    }
}
