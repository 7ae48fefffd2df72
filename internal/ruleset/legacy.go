package ruleset
func (r *Ruleset) addLegacy() {}
