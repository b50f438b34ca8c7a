/**
 * Writes the golden pages from test/reference. Run: npx ts-node --transpile-only test/golden/make.ts
 * Files that exist are never changed: a changed format is a new version.
 */
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import {
  GOLDEN_VERSION,
  goldenBytes,
  goldenEntry,
  goldenInput,
  goldenSets,
  referencePage,
  type GoldenManifest,
} from './golden';

for (const [set, cases] of Object.entries(goldenSets)) {
  const path = join(__dirname, `${set}.json`);
  const made = cases.map((one) => {
    const input = goldenInput(one);
    const page = goldenBytes(referencePage(one, input));
    return { page, entry: goldenEntry(one, input, page) };
  });
  const manifest: GoldenManifest = { formatVersion: GOLDEN_VERSION, pages: made.map(({ entry }) => entry) };
  const text = `${JSON.stringify(manifest, null, 1)}\n`;
  if (existsSync(path) && readFileSync(path, 'utf8') !== text) {
    process.stderr.write(
      `${path} is of another format. Raise the version (native/format/page.h, docs, golden.ts).\n`,
    );
    process.exitCode = 1;
  } else {
    mkdirSync(join(__dirname, `v${GOLDEN_VERSION}`), { recursive: true });
    writeFileSync(path, text);
    for (const { page, entry } of made)
      if (entry.file !== undefined) writeFileSync(join(__dirname, entry.file), page);
    process.stdout.write(`${set}: ${made.length} pages\n`);
  }
}
