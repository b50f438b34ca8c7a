'use strict';

// Tests are only transpiled here (tsconfig.json sets isolatedModules); `npm run typecheck` checks the types.
module.exports = {
  testEnvironment: 'node',
  roots: ['<rootDir>/test'],
  testMatch: ['**/*.test.ts'],
  maxWorkers: '100%', // by default one core less: half of a machine with two
  transform: { '^.+\\.ts$': ['ts-jest', { tsconfig: 'tsconfig.json' }] },
};
