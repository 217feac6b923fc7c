// chokidar polling with its default interval. Usage: node poll_chokidar.js CHOKIDAR DIRECTORY
const chokidar = require(process.argv[2])

chokidar
  .watch(process.argv[3], { usePolling: true, ignoreInitial: true })
  .on('ready', () => console.log('READY'))
  .on('change', (path) => console.log(`${process.hrtime.bigint()} ${path}`))
