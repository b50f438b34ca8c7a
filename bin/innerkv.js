#!/usr/bin/env node
'use strict';
// Runs the compiled command line; in a checkout without dist/, or with INNERKV_SOURCE=1, runs lib/ through ts-node.
const { existsSync } = require('node:fs');
const { join } = require('node:path');

const root = join(__dirname, '..');
const compiled = join(root, 'dist', 'cli', 'main.js');
if (existsSync(compiled) && process.env.INNERKV_SOURCE !== '1') {
  require(compiled);
} else {
  require('ts-node').register({ transpileOnly: true, project: join(root, 'tsconfig.json') });
  require(join(root, 'lib', 'cli', 'main.ts'));
}
