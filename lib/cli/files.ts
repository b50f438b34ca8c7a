/** Writing results. */
import { renameSync, rmSync, writeFileSync } from 'node:fs';

/** A file that is there is whole: an interrupted write leaves none, or the old one. */
export function writeWhole(path: string, data: Uint8Array | string): void {
  const partial = `${path}.${process.pid}.partial`;
  try {
    writeFileSync(partial, data);
    renameSync(partial, path);
  } catch (error) {
    rmSync(partial, { force: true });
    throw error;
  }
}
