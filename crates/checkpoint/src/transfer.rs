//! Moving files to and from object stores: in parts, a few at a time, so that no request is long and a slow line is no
//! timeout.

use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutOptions, path::Path};

use crate::{
    error::{Error, Result},
    store::{Store, failed},
    write::create,
};

/// Bytes of a request. Object stores want at least 5 MiB of a part.
const PART: usize = 8 << 20;
/// Requests on their way at a time.
const AT_A_TIME: usize = 4;

/// A file in ranges, in order, a few of them ahead.
pub(crate) fn in_ranges<'a>(
    objects: &'a Arc<dyn ObjectStore>,
    path: &'a Path,
    size: u64,
) -> impl Stream<Item = object_store::Result<Bytes>> + Unpin + 'a {
    let starts = (0..size).step_by(PART);
    let get = move |start: u64| async move {
        objects.get_range(path, start..(start + PART as u64).min(size)).await
    };
    Box::pin(stream::iter(starts).map(get).buffered(AT_A_TIME))
}

impl Store {
    /// Creates a file of a checkpoint whole or not at all. Says `false` when there is one.
    ///
    /// Large files travel to object stores in parts, which know no "create if absent": a file that is there already is
    /// looked for first. Two writers of one name would need the same step, attempt and generation; the manifest, which
    /// decides, is small and created only if absent.
    pub(crate) async fn create_file(
        &self,
        objects: &dyn ObjectStore,
        path: &Path,
        content: Bytes,
    ) -> Result<bool> {
        if !self.is_remote() || content.len() <= PART {
            return create(objects, path, content).await;
        }
        match objects.head(path).await {
            Ok(_) => return Ok(false),
            Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(failed("look for", path.as_ref())(error)),
        }
        put_in_parts(objects, path, content).await?;
        Ok(true)
    }

    /// Puts files into the folder `name` of the store, in place of what is there; gives the folder's location. `may_go_on`
    /// is asked before anything that is there is touched. The first file is taken away first and put last, so that a
    /// reader who needs it sees all of the old files or all of the new ones, or none.
    ///
    /// # Errors
    /// [`Error::GivenUp`], [`Error::Store`], [`Error::Full`], [`Error::Denied`]
    pub async fn put_folder(
        &self,
        name: &str,
        files: &[(String, Bytes)],
        may_go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<String> {
        let objects = self.objects_to_write()?;
        let folder = Path::from(name);
        if !may_go_on() {
            let reason = "the credit of this worker ran out".to_owned();
            return Err(Error::GivenUp { path: name.to_owned(), reason });
        }
        let path_of = |file: &str| Path::from(format!("{name}/{file}"));
        if let Some((first, _)) = files.first() {
            match objects.delete(&path_of(first)).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(failed("replace", name)(error)),
            }
        }
        let old: Vec<_> = objects.list(Some(&folder)).try_collect().await.map_err(failed("list", name))?;
        let is_new = |path: &Path| files.iter().any(|(file, _)| *path == path_of(file));
        for meta in old.iter().filter(|meta| !is_new(&meta.location)) {
            objects.delete(&meta.location).await.map_err(failed("replace", meta.location.as_ref()))?;
        }
        for (file, content) in files.iter().rev() {
            let path = path_of(file);
            if content.len() > PART {
                put_in_parts(&*objects, &path, content.clone()).await?;
            } else {
                let options = PutOptions::from(PutMode::Overwrite);
                let put = objects.put_opts(&path, content.clone().into(), options).await;
                put.map_err(failed("write", path.as_ref()))?;
            }
        }
        Ok(format!("{}/{name}", self.location().trim_end_matches('/')))
    }
}

/// Puts a large file; what was sent of one that fails is taken back.
async fn put_in_parts(objects: &dyn ObjectStore, path: &Path, content: Bytes) -> Result<()> {
    let mut upload = objects.put_multipart(path).await.map_err(failed("write", path.as_ref()))?;
    let sent = send_parts(&mut *upload, content).await;
    if let Err(error) = sent {
        // If that fails too, the store's own rules for unfinished uploads remain.
        let _ = upload.abort().await;
        return Err(failed("write", path.as_ref())(error));
    }
    Ok(())
}

async fn send_parts(upload: &mut dyn MultipartUpload, content: Bytes) -> object_store::Result<()> {
    let mut parts = Vec::new();
    for start in (0..content.len()).step_by(PART) {
        let part = content.slice(start..(start + PART).min(content.len()));
        parts.push(upload.put_part(part.into()));
    }
    stream::iter(parts).buffer_unordered(AT_A_TIME).try_collect::<Vec<()>>().await?;
    upload.complete().await.map(drop)
}
