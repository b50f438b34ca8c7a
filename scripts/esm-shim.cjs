'use strict';
// Writes the ESM entry: one line that re-exports the CommonJS build, so both module systems share one set of classes.
const { writeFileSync } = require('node:fs');
const { join } = require('node:path');

const dist = join(__dirname, '..', 'dist');
for (const name of ['index.mjs', 'index.d.mts'])
  writeFileSync(join(dist, name), "export * from './index.js';\n");
