/** The command line. */
import { demo } from './demo';
import { doctor } from './doctor';
import { estimate } from './estimate';
import { generate } from './generate';
import { inspect } from './inspect';
import { runProgram } from './program';

runProgram({
  name: 'innerkv',
  summary: 'innerkv: a low-bit KV cache with fused attention',
  commands: [doctor, estimate, inspect, demo, generate],
});
